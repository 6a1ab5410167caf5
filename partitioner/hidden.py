"""How much of a model the modules and functions that were kept whole hide from the cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .captured import Capture, OpaqueCall


@dataclass(frozen=True)
class Hidden:
    """What one opaque module or function hides.

    Attributes:
        path, type_name: the module, as in :class:`OpaqueCall`; of a function, its name and "function".
        n_modules: modules that it consists of, itself included; none for a function.
        parameter_share: its part of the model's parameters, between 0 and 1; a tied parameter counts once.
        flop_share: its part of the model's forward FLOPs; None where they are not known, or where there are none.
    """

    path: str
    type_name: str
    n_modules: int
    parameter_share: float
    flop_share: float | None


def hidden(capture: Capture) -> tuple[Hidden, ...]:
    """Say what each opaque module hides, in the order of ``capture.opaque``."""
    return tuple(
        Hidden(
            call.name,
            call.type_name,
            0 if call.function else sum(1 for _ in capture.model.get_submodule(call.path).modules()),
            parameter_share(capture, [call]),
            flop_share(capture, [call]),
        )
        for call in capture.opaque
    )


def parameter_share(capture: Capture, calls: Iterable[OpaqueCall]) -> float:
    """Return the part of the model's parameters that modules hold together; functions hold none."""
    modules = [capture.model.get_submodule(call.path) for call in calls if call.function is None]
    inside = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(inside.values()) / max(1, sum(p.numel() for p in capture.model.parameters()))


def flop_share(capture: Capture, calls: Iterable[OpaqueCall]) -> float | None:
    """Return the part of the model's forward FLOPs that opaque modules and functions have together."""
    if capture.is_whole:
        return 1.0
    total = capture.flops.get("", 0)
    return sum(capture.flops.get(call.name, 0) for call in calls) / total if total else None
