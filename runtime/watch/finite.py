"""The check of what crosses stages: values and gradients that are not finite are noted where they come up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ...structure import flatten
from .finding import BACKWARD, FORWARD, INPUT, LOSS, NonFinite, first_of

if TYPE_CHECKING:
    from ..requests import StepRequest
    from ..stage import StageRuntime

_WIDER = {torch.complex32: torch.complex64}  # which has no sum


class Boundaries:
    """Looks at what leaves the stages of one worker, and keeps the finding that comes first in the flow of data.

    What comes in was looked at where it left. Infinity is let through in values that carry no gradient: masks are
    made of it.
    """

    def __init__(self) -> None:
        self.found: NonFinite | None = None

    def begin(self) -> None:
        """Start a step."""
        self.found = None

    @torch.no_grad()
    def forward(self, stage: StageRuntime, m: int, request: StepRequest) -> None:
        """Look at what leaves a stage after its forward of microbatch ``m``."""
        held = stage.held[m]
        names = dict.fromkeys(name for group in stage.spec.wires_out for name in group.values)
        phase, found = FORWARD, _first_bad((name, held.results[name]) for name in names)
        if stage.spec.is_last and found is None:
            phase, found = _at_the_end(stage, m, request)
        if found is None:
            return
        target = request.targets[m] if phase == LOSS and request.targets is not None else None
        given = [(name, request.inputs[m].get(name)) for name in stage.spec.graph_inputs] + [("target", target)]
        blamed = _first_bad(given)
        self._note(stage, m, phase if blamed is None else INPUT, blamed or found)

    @torch.no_grad()
    def backward(self, stage: StageRuntime, m: int) -> None:
        """Look at the gradients that leave a stage after its backward of microbatch ``m``."""
        pairs = (
            pair for group in stage.spec.wires_in for pair in zip(group.values, stage.input_gradients(m, group.stage))
        )
        found = _first_bad(pairs, infinity=True)
        if found is not None:
            self._note(stage, m, BACKWARD, found)

    def _note(self, stage: StageRuntime, m: int, phase: str, found: tuple[str, str]) -> None:
        value, kind = found
        path = next((record.module_path for record in stage.spec.nodes if record.name == value), "")
        self.found = first_of([self.found, NonFinite(stage.spec.index, m, phase, value, path, kind)])


def _at_the_end(stage: StageRuntime, m: int, request: StepRequest) -> tuple[str, tuple[str, str] | None]:
    """Look at the loss, and at the model's result if that is wanted or the loss is bad."""
    loss = stage.held[m].loss if request.want_loss and request.weights[m] != 0 else None
    kind = kind_of(loss, infinity=True)
    found = _first_bad(stage.named_output(m)) if kind or request.want_outputs else None
    if found is None and kind is not None:
        return LOSS, ("loss", kind)
    return FORWARD, found


def _first_bad(named: Iterable[tuple[str, Any]], *, infinity: bool = False) -> tuple[str, str] | None:
    """Return the name of the first value with something in it that is not finite, and what that is."""
    for name, value in named:
        for leaf in flatten(value)[0]:
            kind = kind_of(leaf, infinity=infinity)
            if kind is not None:
                return name, kind
    return None


def kind_of(leaf: Any, *, infinity: bool = False) -> str | None:
    """Say ``"NaN"`` or ``"infinity"`` of a tensor or number that holds one; None if all of it is as it should be.

    A sum is not finite as soon as one of its terms is not, and it is the fastest look at all of a tensor; only where
    it is not, which large terms alone can bring about too, each is looked at. Without ``infinity`` only NaN is reported
    of what carries no gradient.
    """
    if isinstance(leaf, float):
        return "NaN" if math.isnan(leaf) else "infinity" if infinity and math.isinf(leaf) else None
    if not isinstance(leaf, torch.Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return None
    values = leaf.detach()
    wide = _WIDER.get(values.dtype) or (torch.float32 if values.dtype.itemsize == 1 else None)
    if wide is not None:
        values = values.to(wide)
    dtype = torch.float32 if values.dtype.itemsize == 2 else None  # sums of 16 bits overflow
    if bool(torch.isfinite(values.sum(dtype=dtype))):
        return None
    if bool(torch.isnan(values).any()):
        return "NaN"
    counts = infinity or leaf.requires_grad
    return "infinity" if counts and bool(torch.isinf(values).any()) else None
