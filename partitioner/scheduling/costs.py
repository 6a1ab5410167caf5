"""What a schedule is made for: seconds and bytes of every stage, and the limits of every worker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConstraintError


@dataclass(frozen=True)
class PipelineCosts:
    """Seconds and bytes of one microbatch, by stage.

    Attributes:
        forward_s, backward_input_s, backward_weight_s: by stage. A backward in one takes the sum of the last two.
        activation_bytes: by stage, held from the start of a forward; all but ``weight_grad_bytes`` is released at the
            end of the input gradient, the rest at the end of the weight gradient.
        weight_grad_bytes: by stage, the part of ``activation_bytes`` that the weight gradient needs.
        link_s: by boundary between stage s and s + 1, the seconds from the end of a computation to the start of the
            one that uses its result on another worker, both ways; transfers go beside computation.
        memory_bytes: by worker, the most that it may hold, infinity for no limit; None for no limits at all.
        op_overhead_s: added to every computation.
        split_backward: whether input and weight gradients may be computed apart.

    Raises:
        ConstraintError: naming the field that has the wrong length or a negative or infinite number.
    """

    forward_s: tuple[float, ...]
    backward_input_s: tuple[float, ...]
    backward_weight_s: tuple[float, ...]
    activation_bytes: tuple[float, ...]
    weight_grad_bytes: tuple[float, ...]
    link_s: tuple[float, ...]
    memory_bytes: tuple[float, ...] | None = None
    op_overhead_s: float = 0.0
    split_backward: bool = True

    def __post_init__(self) -> None:
        n = self.n_stages
        if n == 0:
            raise ConstraintError("forward_s is empty: there must be at least one stage")
        for name in ("backward_input_s", "backward_weight_s", "activation_bytes", "weight_grad_bytes"):
            self._expect(name, getattr(self, name), n, f"one number for each of {n} stages, as forward_s has")
        self._expect("forward_s", self.forward_s, n, "")
        self._expect("link_s", self.link_s, n - 1, f"one number for each of {n - 1} boundaries, or one for all")
        if any(math.isnan(limit) or limit < 0 for limit in self.memory_bytes or ()):
            raise ConstraintError(f"memory_bytes must not be negative, got {list(self.memory_bytes or ())}")
        self._expect("op_overhead_s", (self.op_overhead_s,), 1, "")
        for s, (own, part) in enumerate(zip(self.activation_bytes, self.weight_grad_bytes)):
            if part > own:
                raise ConstraintError(
                    f"weight_grad_bytes[{s}] is {part:g}, more than activation_bytes[{s}], {own:g}, whose part it is"
                )

    @staticmethod
    def _expect(name: str, values: Sequence[float], length: int, what: str) -> None:
        if len(values) != length:
            raise ConstraintError(f"{name} must have {what}; got {len(values)}")
        for place, value in enumerate(values):
            if not 0 <= value < math.inf:
                raise ConstraintError(f"{name}[{place}] must be finite and not negative, got {value}")

    @property
    def n_stages(self) -> int:
        """Count the stages."""
        return len(self.forward_s)

    def seconds(self, kind: str, stage: int) -> float:
        """Return what one computation takes, its overhead included."""
        if kind == "F":
            own = self.forward_s[stage]
        else:
            own = self.backward_input_s[stage] if kind in "IB" else 0.0
            own += self.backward_weight_s[stage] if kind in "WB" else 0.0
        return own + self.op_overhead_s

    def kinds(self) -> str:
        """Name the kinds of computation in a training step."""
        return "FIW" if self.split_backward else "FB"

    def work_s(self, stage: int) -> float:
        """Return what one microbatch takes on a stage at least."""
        return sum(self.seconds(kind, stage) for kind in "FB")
