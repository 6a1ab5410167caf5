"""Gradients of steps under ``no_sync``: parts that replicas have yet to sum, which the user may drop meanwhile."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import StageError


@dataclass(frozen=True)
class _Held:
    parameter: nn.Parameter
    shown: torch.Tensor | None  # what ``.grad`` was made to be; None where there was a gradient before
    version: int


class Unsynced:
    """Which parameters have a gradient that is not summed yet.

    Such a gradient is shown as ``.grad``, as DistributedDataParallel shows its own, so that ``zero_grad()`` and
    ``set_to_none`` do to it what they do there; a change of its values would reach one replica alone, and is refused.
    """

    def __init__(self, why_not: str | None = None) -> None:
        """Take why gradients cannot be kept apart, if they cannot."""
        self._why_not = why_not
        self._held: dict[str, _Held] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def hold(self, name: str, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Note that ``gradient`` is a part of what the parameter's gradient will be."""
        shown = None
        if parameter.grad is None:
            parameter.grad = shown = gradient
        self._held[name] = _Held(parameter, shown, gradient._version)

    def drop(self) -> None:
        """Take back parts that nobody is left to sum: shown as ``.grad``, they would pass for gradients."""
        lost = [held for held in self._held.values() if held.parameter.grad is not None]
        for held in lost:
            if held.parameter.grad is held.shown:
                held.parameter.grad = None
        self._held.clear()
        if lost:
            warnings.warn(
                f"stagecut: gradients of {len(lost)} parameters that steps under no_sync added up were never summed, "
                "and are dropped: end an accumulation with a step outside of no_sync",
                stacklevel=4,
            )

    def check(self, sync: bool) -> None:
        """Refuse a step, one that sums gradients (``sync``) or not, if values of a part were changed.

        Raises:
            StageError: they were, or parts cannot be kept.
        """
        if not sync and self._why_not is not None:
            raise StageError(
                f"no_sync() {self._why_not}",
                hint="leave it out: gradients of several steps add up all the same",
            )
        for name, held in self._held.items():
            if held.parameter.grad is None or held.shown is None:
                continue
            if held.parameter.grad is not held.shown or held.shown._version != held.version:
                raise StageError(
                    f"the gradient of {name} was changed between steps under no_sync, where it is one replica's part",
                    hint="clip and scale gradients after a step outside of it; zero_grad(set_to_none=True) drops them",
                )

    def resume(self) -> frozenset[str]:
        """Begin another step: name the parameters whose parts go on. The user has dropped the others."""
        kept = frozenset(name for name, held in self._held.items() if held.parameter.grad is not None)
        for held in self._held.values():
            if held.shown is not None:
                held.parameter.grad = None
        self._held.clear()
        return kept
