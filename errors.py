"""The errors that a user can meet: each says what, where, why and what to do."""

from __future__ import annotations

from dataclasses import dataclass


class StagecutError(Exception):
    """Base of every error that stagecut raises on purpose.

    ``hint`` is a line that can be acted on (often pasted); it is printed under the message.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.hint}" if self.hint else self.message


class CaptureError(StagecutError):
    """The model could not be turned into a graph that computes what the model computes."""


class PlanError(StagecutError):
    """A plan is malformed, or does not belong to the model that it is used with."""


class InfeasibleError(PlanError):
    """No plan satisfies the constraints (memory, stage count, pins)."""


class ConstraintError(PlanError):
    """The constraints that were asked for contradict each other or name what is not there."""


class ShapeError(StagecutError):
    """The values given to a call do not fit the captured model or the batch."""


class StageError(StagecutError):
    """A stage failed in a way that could not be re-raised as the original exception."""


class NonFiniteError(StageError):
    """A loss, or what crosses stages, is not finite (``check_finite``); the pipeline goes on all the same.

    Attributes:
        stage, microbatch: where the first such value came up.
        phase: ``"forward"``, ``"loss"``, ``"backward"``, or ``"input"`` where the batch itself holds it.
        value, module_path: the op that made it, and the module of the model that the op belongs to.
        stagecut: the same as a :class:`FailureSite`, as other errors have it.
    """

    stage: int
    microbatch: int
    phase: str
    value: str
    module_path: str
    stagecut: FailureSite


class WorkerLost(StagecutError):
    """A worker process ended without being asked to."""


class StallError(StagecutError):
    """No instruction was completed anywhere for longer than the timeout."""


class CheckpointError(StagecutError):
    """A state dict or checkpoint could not be written, read or verified."""


class DeviceError(StagecutError):
    """A device that was asked for does not exist or cannot be used here."""


@dataclass(frozen=True)
class FailureSite:
    """Where in the pipeline an exception was raised; attached to it as ``error.stagecut``."""

    worker: int
    stage: int | None
    microbatch: int | None
    instruction: str
    module_path: str | None = None

    def __str__(self) -> str:
        parts = [f"worker {self.worker}"]
        if self.stage is not None:
            parts.append(f"stage {self.stage}")
        if self.microbatch is not None:
            parts.append(f"microbatch {self.microbatch}")
        if self.module_path:
            parts.append(f"module {self.module_path}")
        return f"{', '.join(parts)} (at {self.instruction})"
