"""The order of compute that a user asks for: by name, or in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConstraintError
from ..runtime.schedules import GIVEN, Orders
from ..runtime.schedules.tokens import shape_of
from .scheduling.files import orders_from_csv, orders_from_json

_SUFFIXES = (".json", ".csv")


@dataclass(frozen=True)
class AskedOrder:
    """A schedule's name, or an order for one replica, with the stages and microbatches that go with it."""

    name: str | None
    n_stages: int | None
    n_microbatches: int | None
    orders: Orders = ()


def order_of(schedule: str | Path | None, n_stages: int | None, n_microbatches: int | None) -> AskedOrder:
    """Read what ``schedule=`` says: nothing or ``"auto"``, a name, or the path of a file.

    A file is an answer of ``partition-viz schedule --json``, or the compute-only CSV of
    ``torch.distributed.pipelining``.

    Raises:
        ConstraintError: the file cannot be read, is no order, or is one of other stages or microbatches than asked for.
    """
    if schedule is None or schedule == "auto":
        return AskedOrder(None, n_stages, n_microbatches)
    path = Path(schedule)
    if path.suffix not in _SUFFIXES:
        return AskedOrder(str(schedule), n_stages, n_microbatches)
    try:
        text = path.read_text()
        orders = orders_from_csv(text) if path.suffix == ".csv" else orders_from_json(json.loads(text))
        owner, count = shape_of(orders)
    except OSError as error:
        raise ConstraintError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        what = "no JSON" if path.suffix == ".json" else "no text"
        raise ConstraintError(f"{path}: {what}: {error}") from error
    except ConstraintError as error:
        raise ConstraintError(f"{path}: {error.message}", hint=error.hint) from error
    for what, asked, own in (("stages", n_stages, len(owner)), ("microbatches", n_microbatches, count)):
        if asked not in (None, own):
            raise ConstraintError(f"{what}={asked} was asked for, and the order in {path} has {own}")
    return AskedOrder(GIVEN, len(owner), count, orders)
