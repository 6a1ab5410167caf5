"""What calls of a pipeline return."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from .program import Timeline


@dataclass(frozen=True)
class Startup:
    """Seconds until a pipeline's first step or forward was done.

    Attributes:
        plan_s: capture, costs, plan and cut, beside which local workers start.
        workers_s: until the workers had their stages; what is left of their own start is part of it.
        first_call_s: the call itself.
    """

    plan_s: float
    workers_s: float
    first_call_s: float

    @property
    def total_s(self) -> float:
        """Return the seconds of all together."""
        return self.plan_s + self.workers_s + self.first_call_s

    def __str__(self) -> str:
        parts = f"plan {self.plan_s:.1f} s, workers {self.workers_s:.1f} s, the call itself {self.first_call_s:.1f} s"
        return f"first result after {self.total_s:.1f} s: {parts}"


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
