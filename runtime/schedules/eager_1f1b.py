"""Eager 1F1B: 1F1B with a longer warm-up, so that transfers have time to arrive.

Zhuang et al., 2022 (https://arxiv.org/abs/2211.05322). Stage s of p holds at most 2 (p - s) - 1 microbatches instead of
p - s; without transfers the bubble is that of 1F1B, and transfers of up to a forward and a backward are hidden.
"""

from __future__ import annotations

from ..instructions import Action, Layout
from .one_f_one_b import alternating, warm_up
from .one_way import Unit, warm_then_alternate


def eager_warm_up(layout: Layout, stage: int) -> int:
    """Return how many microbatches one replica of ``stage`` holds in the steady state."""
    return 2 * warm_up(layout, stage) - 1


def eager_1f1b(layout: Layout, n_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Return, per worker, the eager 1F1B order of its stage; replicas may differ in number.

    Raises:
        ConstraintError: a worker owns several stages.
    """
    return alternating("eager-1f1b", layout, n_microbatches, [eager_warm_up(layout, s) for s in range(layout.n_stages)])


def order(position: int, n_workers: int, n_microbatches: int) -> list[Unit]:
    """Return one worker's forwards and backwards in a pipeline without replicas."""
    return warm_then_alternate(2 * (n_workers - position) - 1, n_microbatches)
