"""Fill-drain: every forward of the batch, then every backward.

The schedule of GPipe (Huang et al., 2019, https://arxiv.org/abs/1811.06965)::

    stage 0   F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
    stage 1   .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
    stage 2   .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .

Each stage holds all its microbatches at once. With equal stages and p stages, m microbatches, the idle share of the
makespan is (p - 1) / (m + p - 1). Backwards run in the order of the microbatches, so gradients are summed in the
order in which a plain loop over the microbatches sums them.
"""

from __future__ import annotations

from ..instructions import Action, Layout


def fill_drain(layout: Layout, n_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Return, per worker, all forwards and then all backwards of its stages."""
    forwards = forward_only(layout, n_microbatches)
    backwards = backward_only(layout, n_microbatches)
    return tuple(fill + drain for fill, drain in zip(forwards, backwards))


def forward_only(layout: Layout, n_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Return, per worker, the forwards of its stages: evaluation, or the first half of fill-drain."""
    return _phase("F", layout, n_microbatches)


def backward_only(layout: Layout, n_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Return, per worker, the backwards of its stages: the second half of fill-drain."""
    return _phase("B", layout, n_microbatches)


def _phase(kind: str, layout: Layout, n_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    orders: list[list[Action]] = [[] for _ in range(layout.n_workers)]
    stages = range(layout.n_stages) if kind == "F" else reversed(range(layout.n_stages))
    for s in stages:
        for r, worker in enumerate(layout.workers[s]):
            orders[worker] += [Action(kind, s, m) for m in layout.microbatches_of(s, r, n_microbatches)]
    return tuple(tuple(order) for order in orders)
