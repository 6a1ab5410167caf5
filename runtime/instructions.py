"""The instruction set of a pipeline program: what a worker can be told to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Op(StrEnum):
    """One kind of instruction.

    ``FORWARD`` and ``BACKWARD`` compute, and so do the two parts of a backward: ``BACKWARD_INPUT`` makes the gradients
    that other stages wait for, ``BACKWARD_WEIGHT``, some time later, those of parameters; ``SEND_*`` hands a packet to
    the transport and does not wait for the other side; ``RECV_*`` posts a receive, and the compute that uses the
    packet waits for it; ``FREE`` drops all that a stage holds for a microbatch; ``REDUCE`` completes the gradients of a
    stage over its replicas and ties.
    """

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_ACT = "send activation"
    RECV_ACT = "receive activation"
    SEND_GRAD = "send gradient"
    RECV_GRAD = "receive gradient"
    FREE = "free"
    REDUCE = "reduce"


COMPUTE = frozenset({Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT})
INPUT_GRADIENTS = frozenset({Op.BACKWARD, Op.BACKWARD_INPUT})  # what other stages wait for
WEIGHT_GRADIENTS = frozenset({Op.BACKWARD, Op.BACKWARD_WEIGHT})  # what ends a microbatch on a stage
SENDS = frozenset({Op.SEND_ACT, Op.SEND_GRAD})
RECEIVES = frozenset({Op.RECV_ACT, Op.RECV_GRAD})
WHOLE_BATCH = -1


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step of one worker's program.

    ``stage`` is the stage that acts. ``microbatch`` is the index in the whole batch, over all replicas
    (``WHOLE_BATCH`` for ``REDUCE``). For transfers ``peer_stage`` and ``peer_worker`` are the other end, else -1.
    """

    op: Op
    stage: int
    microbatch: int
    peer_stage: int = -1
    peer_worker: int = -1

    def __str__(self) -> str:
        if self.op in COMPUTE:
            return f"{self.op.value}(stage {self.stage}, microbatch {self.microbatch})"
        if self.op in SENDS:
            where = f" to stage {self.peer_stage} on worker {self.peer_worker}"
        elif self.op in RECEIVES:
            where = f" from stage {self.peer_stage} on worker {self.peer_worker}"
        else:
            where = ""
        which = "" if self.microbatch == WHOLE_BATCH else f", microbatch {self.microbatch}"
        return f"{self.op.value}(stage {self.stage}{which}){where}"


@dataclass(frozen=True, slots=True)
class Action:
    """One compute of a schedule, before lowering, of one microbatch.

    ``kind`` is ``"F"`` (forward), ``"B"`` (backward), or a part of a backward: ``"I"`` (gradients of the stage's
    inputs) or ``"W"`` (gradients of its parameters).
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


@dataclass(frozen=True)
class Layout:
    """Which workers own which stage, and which stages exchange values.

    Attributes:
        workers: per stage, the worker of each of its replicas.
        wires: pairs (producing stage, consuming stage) between which activations travel, ``producer < consumer``.
        gradient_wires: the subset of ``wires`` that carries gradients back.
    """

    workers: tuple[tuple[int, ...], ...]
    wires: tuple[tuple[int, int], ...]
    gradient_wires: tuple[tuple[int, int], ...]

    @property
    def n_stages(self) -> int:
        """Count the stages."""
        return len(self.workers)

    @property
    def n_workers(self) -> int:
        """Count the workers."""
        return 1 + max(worker for owners in self.workers for worker in owners)

    @property
    def n_replicas(self) -> int:
        """Return the largest replica count of any stage: how many pieces of the batch go side by side."""
        return max(len(owners) for owners in self.workers)

    def worker_of(self, stage: int, microbatch: int) -> int:
        """Return the worker that computes ``microbatch`` in ``stage``: replicas take microbatches in turn."""
        owners = self.workers[stage]
        return owners[microbatch % len(owners)]

    def round_of(self, stage: int, microbatch: int) -> int:
        """Return which microbatch of its replica of ``stage`` it is, counted from 0."""
        return microbatch // len(self.workers[stage])

    def microbatches_of(self, stage: int, replica: int, n_microbatches: int) -> range:
        """Return the microbatches that one replica of a stage computes, of ``n_microbatches`` in the batch."""
        return range(replica, n_microbatches, len(self.workers[stage]))

    def consumers(self, stage: int, *, gradients: bool = False) -> tuple[int, ...]:
        """List the stages that ``stage`` sends activations to (those that send gradients back, if asked)."""
        pairs = self.gradient_wires if gradients else self.wires
        return tuple(sorted(to for origin, to in pairs if origin == stage))

    def producers(self, stage: int, *, gradients: bool = False) -> tuple[int, ...]:
        """List the stages that ``stage`` receives activations from (those it returns gradients to, if asked)."""
        pairs = self.gradient_wires if gradients else self.wires
        return tuple(sorted(origin for origin, to in pairs if to == stage))
