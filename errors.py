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
    """A worker process ended without being asked to.

    Attributes:
        worker: its index.
        pid: of its process; None if that is not known.
        stage, replica, microbatch: where it was in its program; None outside of a step.
        step: which training step of the pipeline it was, counted from 1; None outside of one.
        signal: what killed it; None if it exited.
        exit_code: what it exited with; None if it was killed.
        peak_bytes: the most memory that it had; None if the system did not say.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        worker: int | None = None,
        pid: int | None = None,
        signal: int | None = None,
        exit_code: int | None = None,
        peak_bytes: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.worker, self.pid, self.signal, self.exit_code = worker, pid, signal, exit_code
        self.peak_bytes = peak_bytes
        self.stage: int | None = None
        self.replica: int | None = None
        self.microbatch: int | None = None
        self.step: int | None = None


@dataclass(frozen=True)
class Waiting:
    """A worker that had not finished its step when that stalled.

    Attributes:
        worker: its index.
        instruction: what it was at; None if it was through with its program.
        waits_for: the workers that had not sent what it needed for that; nobody, if it was busy itself.
        stack: its threads' Python stacks, as text, or why there are none.
    """

    worker: int
    instruction: str | None
    waits_for: tuple[int, ...]
    stack: str = ""

    def __str__(self) -> str:
        if self.instruction is None:
            return f"worker {self.worker} is through with its program"
        where = f"worker {self.worker} is at {self.instruction}"
        if not self.waits_for:
            return where
        return f"{where} and waits for worker {' and '.join(map(str, self.waits_for))}"


class StallError(StagecutError):
    """No instruction was completed anywhere for longer than the deadline.

    Attributes:
        step: which training step of the pipeline it was, counted from 1; None outside of one.
        waiting: per worker that had not finished: what it was at, for whom it waited, and its Python stacks.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.step: int | None = None
        self.waiting: tuple[Waiting, ...] = ()


class OutOfMemoryError(StageError):
    """A stage needed more memory than there was.

    Attributes:
        planned_bytes: what the plan expected of the worker.
        used_bytes: what its process had when memory ran out; None if the system did not say.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, planned_bytes: int = 0, used_bytes: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.planned_bytes, self.used_bytes = planned_bytes, used_bytes


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
    replica: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        parts = [f"worker {self.worker}"]
        if self.step is not None:
            parts.insert(0, f"step {self.step}")
        if self.stage is not None:
            parts.append(f"stage {self.stage}")
        if self.replica is not None:
            parts.append(f"replica {self.replica}")
        if self.microbatch is not None:
            parts.append(f"microbatch {self.microbatch}")
        if self.module_path:
            parts.append(f"module {self.module_path}")
        return f"{', '.join(parts)} (at {self.instruction})"
