"""A worker that is slow: busy for longer than its plan says, measured by how the plan fares with the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from ..instructions import COMPUTE, SENDS
from ..program.timeline import Timeline

FACTOR = 1.5
STEPS = 10
# What a warning is about must be worth planning anew: below this the interpreter's own pace decides.
LEAST_S = 5e-3
_LEAST_SHARE = 0.05  # of the step
_BUSY = frozenset(op.value for op in (*COMPUTE, *SENDS))


class SlowWorkers:
    """Compares, step by step, how busy workers are with what was planned.

    A machine under load, or costs from a roofline, make every prediction wrong by one factor, which says nothing about
    a worker. So each worker's measured over planned seconds is held against the median of the *other* workers' ratios:
    it is slow if its own is 1.5 times that for ten full training steps in a row, and if what it takes too long makes a
    difference: 5 ms, and 5 % of the step. One worker alone cannot be told from a slow machine.
    """

    def __init__(self, predicted: Callable[[], Timeline]) -> None:
        """Take what returns the plan's timeline; it is simulated when a step with several workers was made."""
        self._predicted = predicted
        self._planned: dict[int, float] | None = None
        self._n_microbatches = 0
        self._streak: dict[int, int] = {}
        self._told = False

    def look(self, busy_s: Mapping[int, float], n_microbatches: int, step_s: float) -> str | None:
        """Look at a training step; returns the figures, once, when a worker has been slow for long enough."""
        if self._told or len(busy_s) < 2:
            return None
        planned = self._planned_s()
        if n_microbatches != self._n_microbatches or any(planned.get(w, 0.0) <= 0.0 for w in busy_s):
            return None  # a shorter batch is shared out in other parts
        ratios = {w: seconds / planned[w] for w, seconds in busy_s.items()}
        if max(ratios.values()) < FACTOR * min(ratios.values()):
            self._streak.clear()
            return None
        for w, ratio in ratios.items():
            others = statistics.median(other for peer, other in ratios.items() if peer != w)
            excess_s = busy_s[w] - planned[w] * others
            slow = ratio >= FACTOR * others and excess_s >= max(LEAST_S, _LEAST_SHARE * step_s)
            self._streak[w] = self._streak.get(w, 0) + 1 if slow else 0
            if self._streak[w] >= STEPS:
                self._told = True
                return _figures(w, busy_s[w], planned[w], others)
        return None

    def _planned_s(self) -> Mapping[int, float]:
        if self._planned is None:
            spans = self._predicted().spans
            self._n_microbatches = 1 + max((span.microbatch for span in spans), default=-1)
            self._planned = {}
            for span in spans:
                if span.op in _BUSY:
                    self._planned[span.worker] = self._planned.get(span.worker, 0.0) + span.end_s - span.start_s
        return self._planned


def _figures(worker: int, busy_s: float, planned_s: float, others: float) -> str:
    return (
        f"worker {worker} is slow: busy for {busy_s * 1e3:.1f} ms of the last step, and for its share of the plan "
        f"{planned_s * others * 1e3:.1f} ms would be in line with the other workers (planned {planned_s * 1e3:.1f} ms, "
        f"of which they take {others:.2f} times as long): {busy_s / (planned_s * others):.1f} times as much, "
        f"{STEPS} steps in a row"
    )
