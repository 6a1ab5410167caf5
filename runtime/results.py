"""What calls of a pipeline return."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from .program import Timeline


@dataclass(frozen=True)
class StepResult:
    """What a training step returns: the loss of the whole batch, a 0-dim tensor without graph."""

    loss: torch.Tensor


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation returns: the model's result for the whole batch, and the loss if there is one."""

    output: Any
    loss: torch.Tensor | None


@dataclass(frozen=True)
class Profile:
    """Measured steps: the timeline of the median one and the wall seconds of each call."""

    timeline: Timeline
    steps_s: tuple[float, ...]

    @property
    def step_s(self) -> float:
        """Return the median wall seconds of a step."""
        return statistics.median(self.steps_s)
