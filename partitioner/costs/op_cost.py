"""The cost of one op: plain numbers with their source."""

from __future__ import annotations

from dataclasses import dataclass

from ...structure import tensors_in
from ..analysis import OpFacts


@dataclass(frozen=True)
class OpCost:
    """What one op costs for one microbatch.

    Attributes:
        forward_s, backward_s: seconds; ``backward_weight_s`` is the part of the backward for gradients of parameters.
        source: ``measured``, ``cached``, ``analytic`` or ``none``.
        workspace_bytes: what the op needs while it runs, beside its inputs, its result and what it saves.
    """

    forward_s: float
    backward_s: float
    source: str
    backward_weight_s: float = 0.0
    workspace_bytes: int = 0


FREE = OpCost(0.0, 0.0, "none")
_FREE_OPS = ("placeholder", "get_attr", "output")


def is_free(facts: OpFacts) -> bool:
    return facts.op in _FREE_OPS or not tensors_in(facts.value)
