"""The cost of one op: plain numbers with their source."""

from __future__ import annotations

from dataclasses import dataclass

from ...structure import tensors_in
from ..analysis import OpFacts


@dataclass(frozen=True)
class OpCost:
    """Seconds of one op for one microbatch. ``source`` is ``measured``, ``cached``, ``analytic`` or ``none``."""

    forward_s: float
    backward_s: float
    source: str


FREE = OpCost(0.0, 0.0, "none")
_FREE_OPS = ("placeholder", "get_attr", "output")


def is_free(facts: OpFacts) -> bool:
    return facts.op in _FREE_OPS or not tensors_in(facts.value)
