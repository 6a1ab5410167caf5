"""Schedules: the order of compute per worker, as data."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import ConstraintError
from ..instructions import Action, Layout
from .eager_1f1b import eager_1f1b
from .families import FAMILIES
from .fill_drain import backward_only, fill_drain, forward_only
from .one_f_one_b import one_f_one_b

Orders = tuple[tuple[Action, ...], ...]

SCHEDULES: dict[str, Callable[[Layout, int], Orders]] = {
    "1f1b": one_f_one_b,
    "fill-drain": fill_drain,
    "eager-1f1b": eager_1f1b,
    "zb-h1": FAMILIES["zb-h1"].make,
    "zb-h2": FAMILIES["zb-h2"].make,
    "forward-only": forward_only,
    "backward-only": backward_only,
}
WHOLE_SCHEDULES = ("1f1b", "fill-drain", "eager-1f1b")
IN_COLUMNS = ("zb-h1", "zb-h2")  # these want as many replicas of every stage
TRAINING_SCHEDULES = (*WHOLE_SCHEDULES, *IN_COLUMNS)


def schedule(name: str, layout: Layout, n_microbatches: int) -> Orders:
    """Return the compute order of every worker under the named schedule.

    Raises:
        ConstraintError: no schedule has that name, or ``n_microbatches`` is not positive.
    """
    if name not in SCHEDULES:
        raise ConstraintError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    if n_microbatches < 1:
        raise ConstraintError(f"a schedule needs at least one microbatch, got {n_microbatches}")
    return SCHEDULES[name](layout, n_microbatches)


__all__ = [
    "IN_COLUMNS",
    "SCHEDULES",
    "TRAINING_SCHEDULES",
    "WHOLE_SCHEDULES",
    "Orders",
    "backward_only",
    "eager_1f1b",
    "fill_drain",
    "forward_only",
    "one_f_one_b",
    "schedule",
]
