"""What a worker counts of a step: plain numbers, at places where the clock is looked at anyway."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepCounts:
    """What one worker did in one step.

    Attributes:
        step_s: from its first instruction until its last packet had left.
        busy_s: of these, in instructions: computing, packing, freeing.
        waiting_s: of these, for packets of other workers, and until its own had left.
        reduce_s: of these, in summing gradients over replicas, their arrival included.
        sent_bytes, n_sent, received_bytes, n_received: packets to and from other workers.
    """

    step_s: float = 0.0
    busy_s: float = 0.0
    waiting_s: float = 0.0
    reduce_s: float = 0.0
    sent_bytes: int = 0
    n_sent: int = 0
    received_bytes: int = 0
    n_received: int = 0
