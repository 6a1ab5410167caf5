"""What a pipeline asks of whoever captures, plans and cuts its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .program import PipelineSpec, Timeline


class Build(Protocol):
    """Capture, plan and cut the model for the arguments of a first call.

    ``target`` is an example of what the loss compares with, where there is one; ``can_step`` says whether it and the
    arguments make a training step.
    """

    target: Any
    can_step: bool

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[tuple[PipelineSpec, Any]]:
        """Return what to launch, and the plan that it came from; several where they are to be tried."""

    def try_out(self, steps: Sequence[Callable[[], None]]) -> tuple[int, Any]:
        """Return which of several to launch, and its plan, by running a step of each in turn."""

    def without_trial(self, problem: Exception) -> tuple[int, Any]:
        """Return which of several to launch, and its plan, where running them met a problem."""

    def replan(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], measure: Callable[[], Timeline], gain: float
    ) -> tuple[PipelineSpec, Any] | None:
        """Plan again with what ``measure`` returns; None if no plan is faster by ``gain``."""
