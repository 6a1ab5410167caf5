"""How stages run, beside the plan."""

from __future__ import annotations

from dataclasses import dataclass

from .replicate import CommHook
from .weights import Weights


@dataclass(frozen=True)
class Options:
    """What a user asked for.

    Attributes:
        compiler: a backend of ``torch.compile`` for every stage.
        defers: whether BatchNorms update their running statistics once a step, from the whole batch.
        comm_hook: makes the communication hook for gradients of replicas under torchrun.
        weights: values for a model on the meta device.
    """

    compiler: str | None = None
    defers: bool = False
    comm_hook: CommHook | None = None
    weights: Weights | None = None
