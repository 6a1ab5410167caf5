"""What one call of a pipeline asks of its workers, and what they answer: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .program.timeline import Span
from .watch.counts import StepCounts
from .watch.finding import NonFinite, first_of

TRAIN, FORWARD, BACKWARD, EVALUATE = "train", "forward", "backward", "evaluate"
PROGRAM_OF = {FORWARD: "forward-only", BACKWARD: "backward-only", EVALUATE: "forward-only"}


@dataclass(frozen=True)
class StepRequest:
    """One batch, cut into microbatches.

    Attributes:
        kind: ``train`` (forward and backward), ``forward`` (activations kept), ``backward`` (of an earlier forward) or
            ``evaluate`` (forward without gradients).
        call: identifies a forward and its later backward.
        signature: per microbatch, equal numbers mean equal shapes.
        inputs: per microbatch, the graph inputs by name.
        targets: per microbatch, what ``loss_fn`` compares with; None where there is no loss.
        weights: per microbatch, its share of the batch's loss; the shares of a mean sum to 1.
        output_gradients: per microbatch, gradients of the leaves of the result (``backward`` only).
        seed: base of the seeds of random ops.
        autocast: dtype of the caller's autocast region, or None outside of one.
        step: which training step of the pipeline it is part of, counted from 1.
        sync: whether replicas sum their gradients in this step; else a later one sums these too.
    """

    kind: str
    call: int
    signature: tuple[int, ...]
    inputs: tuple[dict[str, Any], ...]
    targets: tuple[Any, ...] | None
    weights: tuple[float, ...]
    seed: int
    autocast: torch.dtype | None = None
    output_gradients: tuple[list[Any], ...] | None = None
    want_loss: bool = False
    want_outputs: bool = False
    profile: bool = False
    sync: bool = True
    step: int = 0

    @property
    def n_microbatches(self) -> int:
        """Count the microbatches of the whole batch."""
        return len(self.signature)


@dataclass
class StepReport:
    """What workers answer: losses and results by microbatch, and the times of what they did.

    ``whole_because`` says, by stage, why a backward ran whole that the schedule has in two parts. ``counts`` is what
    the workers that answer counted, ``busy_s`` the busy seconds of all workers, where they are known; ``nonfinite`` is
    the first value that is not finite, if boundaries are looked at; ``n_restarts`` is how often workers were lost and
    replaced for it.
    """

    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    whole_because: dict[int, str] = field(default_factory=dict)
    counts: dict[int, StepCounts] = field(default_factory=dict)
    busy_s: dict[int, float] = field(default_factory=dict)
    nonfinite: NonFinite | None = None
    n_restarts: int = 0

    def merge(self, other: StepReport) -> None:
        """Add what another worker reports."""
        self.losses.update(other.losses)
        self.outputs.update(other.outputs)
        self.spans.extend(other.spans)
        self.whole_because.update(other.whole_because)
        self.counts.update(other.counts)
        self.busy_s.update({worker: counts.busy_s for worker, counts in other.counts.items()})
        self.nonfinite = first_of([self.nonfinite, other.nonfinite])
