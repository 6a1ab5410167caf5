"""The cost of one op: plain numbers with their source."""

from __future__ import annotations

from dataclasses import dataclass

from ...structure import tensors_in
from ..analysis import OpFacts


@dataclass(frozen=True)
class OpCost:
    """What one op costs for one microbatch.

    Attributes:
        forward_s, backward_s: seconds.
        source: ``measured``, ``cached``, ``analytic`` or ``none``.
        backward_weight_s: the part of ``backward_s`` that makes gradients of parameters; no other op waits for it.
        workspace_bytes: memory at the op's worst moment beyond its inputs, its outputs, the gradients of both, and what
            it saves; new gradients of its parameters, before they are added to older ones, count.
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
