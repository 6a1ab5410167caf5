"""Computations of a schedule as short texts, as ``torch.distributed.pipelining`` writes them in its CSV files."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...errors import ConstraintError
from ..instructions import Action

_TOKEN = re.compile(r"(\d{1,9})([FBIW])(\d{1,9})")


def token(action: Action) -> str:
    """Write an action: stage, kind, microbatch.

    >>> token(Action("I", 2, 5))
    '2I5'
    """
    return f"{action.stage}{action.kind}{action.microbatch}"


def from_token(text: str, where: str) -> Action:
    """Read what :func:`token` wrote.

    Raises:
        ConstraintError: the text is something else.
    """
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        raise ConstraintError(f"{where}: expected stage, F, B, I or W, and microbatch, such as 0F3; got {text!r}")
    return Action(match[2], int(match[1]), int(match[3]))


def actions_of(orders: Sequence[Sequence[str]]) -> tuple[tuple[Action, ...], ...]:
    """Read an order per worker.

    Raises:
        ConstraintError: a text is no computation; with its place.
    """
    return tuple(
        tuple(from_token(text, f"$.orders[{w}][{place}]") for place, text in enumerate(row))
        for w, row in enumerate(orders)
    )


def shape_of(orders: Sequence[Sequence[Action]]) -> tuple[tuple[int, ...], int]:
    """Return the worker of each stage, and the number of microbatches, of orders from elsewhere.

    Raises:
        ConstraintError: a stage is on two workers, or stages or microbatches are missing.
    """
    owner: dict[int, int] = {}
    for worker, order in enumerate(orders):
        for action in order:
            if owner.setdefault(action.stage, worker) != worker:
                raise ConstraintError(
                    f"the order has stage {action.stage} on workers {owner[action.stage]} and {worker}; it is for one "
                    "replica of every stage"
                )
    if sorted(owner) != list(range(len(owner))) or len(set(owner.values())) < len(orders) or not owner:
        raise ConstraintError(
            f"the order must have stages 0, 1, ... and something for each of {len(orders)} workers to do; it has "
            f"stages {sorted(owner)}"
        )
    n_microbatches = 1 + max(action.microbatch for order in orders for action in order)
    return tuple(owner[s] for s in range(len(owner))), n_microbatches
