"""1F1B: after a warm-up, one forward and one backward in turn.

The synchronous schedule of PipeDream-Flush (Narayanan et al., 2021, https://arxiv.org/abs/2006.09503)::

    stage 0   F0 F1 F2 .  .  B0 F3 .  B1 .  B2 .  B3
    stage 1   .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .  .
    stage 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .  .

Stage s of p holds at most p - s microbatches. The bubble is that of fill-drain, (p - 1) / (m + p - 1) with equal
stages. With replicas, a stage warms up with as many microbatches as keep the later stages busy:
ceil(workers from here to the end / workers of this stage), PipeDream's rule (https://arxiv.org/abs/1806.03377, 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ConstraintError
from ..instructions import Action, Layout
from .one_way import warm_then_alternate


def warm_up(layout: Layout, stage: int) -> int:
    """Return how many microbatches one replica of ``stage`` holds in the steady state."""
    later = sum(len(owners) for owners in layout.workers[stage:])
    return -(-later // len(layout.workers[stage]))


def one_f_one_b(layout: Layout, n_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Return, per worker, the 1F1B order of its stage.

    Raises:
        ConstraintError: a worker owns several stages, which plain 1F1B does not order.
    """
    return alternating("1f1b", layout, n_microbatches, [warm_up(layout, s) for s in range(layout.n_stages)])


def alternating(name: str, layout: Layout, n_microbatches: int, held: Sequence[int]) -> tuple[tuple[Action, ...], ...]:
    """Forward ``held[s]`` microbatches on each replica of stage s, then go backward and forward in turn.

    Raises:
        ConstraintError: a worker owns several stages.
    """
    orders: list[tuple[Action, ...]] = [() for _ in range(layout.n_workers)]
    for s, owners in enumerate(layout.workers):
        for r, worker in enumerate(owners):
            if orders[worker]:
                raise ConstraintError(
                    f"{name} runs one stage per worker; worker {worker} owns several: use 'fill-drain'"
                )
            mine = layout.microbatches_of(s, r, n_microbatches)
            units = warm_then_alternate(held[s], len(mine))
            orders[worker] = tuple(Action(kind, s, mine[m]) for kind, m in units)
    return tuple(orders)
