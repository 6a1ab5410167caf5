"""How stages run, beside the plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from .batchnorm import MICROBATCH
from .replicate import CommHook
from .weights import Weights


@dataclass(frozen=True)
class StageOptions:
    """How one stage runs.

    Attributes:
        compiler: a backend of ``torch.compile`` for it.
        batchnorm: where its BatchNorms take their statistics from, one of :data:`batchnorm.MODES`.
        check_boundaries: whether what crosses stages is looked at for values that are not finite.
        fuses_accumulation: whether products add to gradients, where its backward is recorded.
        onednn_matmul: whether oneDNN computes large products of 32-bit floats, where it is recorded.
    """

    compiler: str | None = None
    batchnorm: str = MICROBATCH
    check_boundaries: bool = False
    fuses_accumulation: bool = False
    onednn_matmul: bool = False


@dataclass(frozen=True)
class Options:
    """What a user asked for.

    Attributes:
        stage: how every stage runs.
        comm_hook: makes the communication hook for gradients of replicas under torchrun.
        shard: whether replicas under torchrun have a share of each parameter.
        weights: values for a model on the meta device.
        on_worker_lost: ``"restart"`` replaces local workers that are lost, ``"raise"`` does not.
    """

    stage: StageOptions = field(default_factory=StageOptions)
    comm_hook: CommHook | None = None
    shard: bool = False
    weights: Weights | None = None
    on_worker_lost: str = "restart"
