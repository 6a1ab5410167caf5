"""What calls of a pipeline return."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ShapeError
from .program import Span, Timeline
from .requests import StepReport, StepRequest


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
    """Measured steps: the timeline of the median one and the wall seconds of each call, in their order."""

    timeline: Timeline
    steps_s: tuple[float, ...]

    @property
    def step_s(self) -> float:
        """Return the median wall seconds of a step."""
        return statistics.median(self.steps_s)


def total_loss(report: StepReport, request: StepRequest) -> torch.Tensor:
    """Return the loss of the whole batch: that of each microbatch by its weight.

    Raises:
        ShapeError: a microbatch has none.
    """
    missing = [m for m in range(request.n_microbatches) if m not in report.losses]
    if missing:
        raise ShapeError(f"no loss was computed for microbatches {missing}")
    counted = [m for m in range(request.n_microbatches) if request.weights[m] != 0]
    parts = [report.losses[m].detach() * request.weights[m] for m in counted]
    return torch.stack([part.cpu() for part in parts]).sum()


def timeline_of(report: StepReport, n_workers: int) -> Timeline:
    """Return what workers did in a step, from its beginning on."""
    origin = min(span.start_s for span in report.spans)
    spans = [Span(s.worker, s.op, s.stage, s.microbatch, s.start_s - origin, s.end_s - origin) for s in report.spans]
    return Timeline("measured", n_workers, tuple(sorted(spans, key=lambda s: (s.worker, s.start_s))))
