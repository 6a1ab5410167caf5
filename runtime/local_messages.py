"""What the parent and a local worker say to each other over their private socket."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FailureSite
from .accelerators import Opener
from .arena import Slot
from .instructions import Instruction, Layout
from .options import StageOptions
from .requests import StepReport, StepRequest
from .surroundings import Surroundings
from .watch.residents import Resident


@dataclass(frozen=True)
class Setup:
    """Everything a worker needs before its first step.

    Descriptors follow it on the socket: the arena's, the mailbox's, and two for each channel that the worker has.

    ``fills`` are the tensors of the meta device that this worker gives their values, with all of their names; these
    come from ``weights``, pickled.
    ``payload`` is pickled (stages, loss_fn) whose tensors refer to ``parameters`` and ``buffers`` by name.
    ``devices`` are those of all workers. ``gradients`` names the parameters whose gradients this worker writes to the
    arena, where replicas sum them; with an accelerator among the workers the parent does.
    ``device_memory`` is, for a worker on an accelerator, how it opens its own arena there, which holds the model's
    state and its gradients, and where these lie in it.
    ``torchvision`` says that the parent uses it, so that the payload may refer to it.
    ``n_threads`` is how many CPU threads the worker computes with; ``options`` say how its stages run; replicas of the
    stages in ``synced`` exchange statistics; ``surroundings`` is what else of the parent's process changes what a
    model computes; ``logs`` is the parent's ``STAGECUT_LOGS``.
    """

    worker: int
    layout: Layout
    devices: tuple[str, ...]
    store_path: str
    arena_bytes: int
    slots: dict[str, Slot]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    gradients: tuple[str, ...]
    device_memory: tuple[Opener, dict[str, Slot]] | None
    fills: tuple[tuple[str, list[str]], ...]
    weights: bytes
    payload: bytes
    torchvision: bool
    n_threads: int
    options: StageOptions
    synced: frozenset[int]
    surroundings: Surroundings
    logs: str

    @property
    def device(self) -> str:
        """Name the worker's own device."""
        return self.devices[self.worker]

    @property
    def with_accelerators(self) -> bool:
        """Say whether any worker is on one."""
        return any(not name.startswith("cpu") for name in self.devices)


@dataclass(frozen=True)
class Run:
    """Do one step.

    ``instructions`` is None when ``program`` was sent before; ``trainable`` (parameters that require gradients) and
    ``modes`` (training flag per module) are None when they are as in the step before. ``goes_on`` names the parameters
    whose gradients are added to what lies in their slots, from steps before that were not summed over replicas.
    """

    program: tuple[str, int]
    instructions: tuple[Instruction, ...] | None
    request: StepRequest
    trainable: frozenset[str] | None
    modes: dict[str, bool] | None
    goes_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forget:
    """Drop the activations of a forward whose backward will not come."""

    call: int


@dataclass(frozen=True)
class Release:
    """Forget the pipeline, and wait ``idle_s`` seconds for the next one to claim the worker; then leave."""

    idle_s: float


@dataclass(frozen=True)
class Claim:
    """Wait for a setup, however long its planning takes."""


@dataclass(frozen=True)
class Ready:
    """The worker has done what it was told before its first step."""


@dataclass(frozen=True)
class Done:
    """The step is complete.

    ``has_gradient`` names the parameters whose gradient the parent reads in this worker's slot; ``parts``, after a step
    that was not summed over replicas, all that this worker has a part of; ``resident`` is the memory that it takes on
    an accelerator.
    """

    report: StepReport
    has_gradient: tuple[str, ...]
    parts: tuple[str, ...] = ()
    resident: Resident | None = None


@dataclass(frozen=True)
class Failed:
    """The step failed; ``error`` is the pickled exception, or None if it could not be pickled.

    ``peer_gone`` says that it failed only because another worker's process has ended; ``used_bytes`` is the most
    memory that the process had, where that ran out.
    """

    error: bytes | None
    type_name: str
    message: str
    traceback: str
    site: FailureSite | None
    peer_gone: bool = False
    used_bytes: int | None = None


Answer = Ready | Done | Failed
