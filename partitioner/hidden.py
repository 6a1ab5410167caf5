"""How much of a model the modules that were kept whole hide from the cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .captured import Capture


@dataclass(frozen=True)
class Hidden:
    """What one opaque module hides.

    Attributes:
        path, type_name: the module, as in :class:`OpaqueCall`.
        n_modules: modules that it consists of, itself included.
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
            call.path,
            call.type_name,
            sum(1 for _ in capture.model.get_submodule(call.path).modules()),
            parameter_share(capture, [call.path]),
            flop_share(capture, [call.path]),
        )
        for call in capture.opaque
    )


def parameter_share(capture: Capture, paths: Iterable[str]) -> float:
    """Return the part of the model's parameters that the modules at ``paths`` hold together."""
    inside = {id(p): p.numel() for path in paths for p in capture.model.get_submodule(path).parameters()}
    return sum(inside.values()) / max(1, sum(p.numel() for p in capture.model.parameters()))


def flop_share(capture: Capture, paths: Iterable[str]) -> float | None:
    """Return the part of the model's forward FLOPs that the opaque modules at ``paths`` have together."""
    paths = list(paths)
    if "" in paths:
        return 1.0
    total = capture.flops.get("", 0)
    return sum(capture.flops[path] for path in paths) / total if total else None
