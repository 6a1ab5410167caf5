"""Schedules: the order of compute per worker, as data."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import ConstraintError
from ..instructions import Action, Layout, Op
from .eager_1f1b import eager_1f1b
from .families import FAMILIES
from .fill_drain import backward_only, fill_drain, forward_only
from .one_f_one_b import one_f_one_b

Orders = tuple[tuple[Action, ...], ...]

ANY_REPLICAS = ("1f1b", "fill-drain", "eager-1f1b")  # these allow a different number of replicas for each stage
IN_COLUMNS = tuple(name for name, family in FAMILIES.items() if family.trains and name not in ANY_REPLICAS)
SCHEDULES: dict[str, Callable[[Layout, int], Orders]] = {
    "1f1b": one_f_one_b,
    "fill-drain": fill_drain,
    "eager-1f1b": eager_1f1b,
    **{name: FAMILIES[name].make for name in IN_COLUMNS},
    "forward-only": forward_only,
    "backward-only": backward_only,
}
TRAINING_SCHEDULES = (*ANY_REPLICAS, *IN_COLUMNS)
SEARCH = "search"  # an order that was made for one plan, and is part of it
GIVEN = "given"  # an order that was read from a file


def placement_of(name: str) -> str:
    """Return how the named training schedule wants stages to lie on workers: ``chain``, ``loop`` or ``vee``."""
    return FAMILIES[name].placement


def computed_by(name: str) -> frozenset[Op]:
    """Return what the named schedule computes of a microbatch: forwards, backwards (maybe in parts) or both."""
    parts = {"forward-only": (Op.FORWARD,), "backward-only": (Op.BACKWARD,)}
    return frozenset(parts.get(name, (Op.FORWARD, Op.BACKWARD)))


def least_microbatches(name: str, n_workers: int) -> int:
    """Return how many microbatches the named schedule needs at least, for each replica, on so many workers each."""
    return FAMILIES[name].least(n_workers) if name in FAMILIES else 1


def schedule(name: str, layout: Layout, n_microbatches: int) -> Orders:
    """Return the compute order of every worker under the named schedule.

    Raises:
        ConstraintError: no schedule has that name, or it does not allow these stages or so few microbatches.
    """
    if name not in SCHEDULES:
        raise ConstraintError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    if n_microbatches < 1:
        raise ConstraintError(f"a schedule needs at least one microbatch, got {n_microbatches}")
    return SCHEDULES[name](layout, n_microbatches)


def of_part(name: str, layout: Layout, n_microbatches: int, *, in_rounds: bool = False) -> Orders:
    """Return the order of a batch that may be too short for the named schedule: that of a longer one, without the rest.

    What is left of an order waits for nothing new and holds no more than before. With ``in_rounds`` all replicas follow
    the same order, also where some have a microbatch less than others.

    Raises:
        ConstraintError: as :func:`schedule`, but not for few microbatches.
    """
    least = least_microbatches(name, layout.n_workers // layout.n_replicas) * layout.n_replicas
    rounded = -(-n_microbatches // layout.n_replicas) * layout.n_replicas if in_rounds else n_microbatches
    return shortened(schedule(name, layout, max(rounded, least)), n_microbatches)


def shortened(orders: Orders, n_microbatches: int) -> Orders:
    """Leave out of an order what is of later microbatches than the first so many."""
    return tuple(tuple(action for action in order if action.microbatch < n_microbatches) for order in orders)


def of_columns(column: Orders, layout: Layout) -> Orders:
    """Let every replica of a layout compute in the order of one, each its own microbatches.

    ``column`` has the order of each worker of one replica, in the order in which stages first name them.
    """
    orders: list[tuple[Action, ...]] = [()] * layout.n_workers
    n = layout.n_replicas
    for replica in range(n):
        workers = dict.fromkeys(owners[replica] for owners in layout.workers)
        for worker, order in zip(workers, column, strict=True):
            orders[worker] = tuple(Action(a.kind, a.stage, a.microbatch * n + replica) for a in order)
    return tuple(orders)


__all__ = [
    "ANY_REPLICAS",
    "GIVEN",
    "IN_COLUMNS",
    "SCHEDULES",
    "SEARCH",
    "TRAINING_SCHEDULES",
    "Orders",
    "backward_only",
    "computed_by",
    "eager_1f1b",
    "fill_drain",
    "forward_only",
    "least_microbatches",
    "of_columns",
    "of_part",
    "one_f_one_b",
    "placement_of",
    "schedule",
    "shortened",
]
