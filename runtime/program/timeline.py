"""A timeline: a program with times, simulated or measured."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from ...representation import html_of

COMPUTE_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_LAST = frozenset("BW")  # after these nothing of a microbatch is held


@dataclass(frozen=True, slots=True)
class Span:
    """One instruction on the time axis: seconds from the start of the step."""

    worker: int
    op: str
    stage: int
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """What every worker did, or would do, and when. ``source`` is ``"simulated"`` or ``"measured"``."""

    source: str
    n_workers: int
    spans: tuple[Span, ...]

    @property
    def makespan_s(self) -> float:
        """Return the seconds from the start of the step to the end of the last instruction."""
        return max((span.end_s for span in self.spans), default=0.0)

    def _repr_html_(self) -> str | None:
        return html_of("Timeline", self)

    def busy_s(self, worker: int) -> float:
        """Return the seconds that ``worker`` computes (forwards and backwards, or their parts)."""
        return self._busy_s.get(worker, 0.0)

    @cached_property
    def _busy_s(self) -> dict[int, float]:
        busy: dict[int, float] = {}
        for span in self.spans:
            if span.op in COMPUTE_NAMES:
                busy[span.worker] = busy.get(span.worker, 0.0) + span.end_s - span.start_s
        return busy

    @property
    def bubble(self) -> float:
        """Return the share of all workers' time in which they do not compute, 0 to 1."""
        total = self.makespan_s * self.n_workers
        busy = sum(self.busy_s(w) for w in range(self.n_workers))
        return max(0.0, 1.0 - busy / total) if total else 0.0  # sums of seconds round

    def peak_in_flight(self, worker: int) -> int:
        """Return the largest number of microbatches whose activations ``worker`` holds at once."""
        events = [
            (span.end_s if span.op in _LAST else span.start_s, -1 if span.op in _LAST else 1)
            for span in self.spans
            if span.worker == worker and (span.op == "F" or span.op in _LAST)
        ]
        held = peak = 0
        for _, change in sorted(events):
            held += change
            peak = max(peak, held)
        return peak

    def grid(self, columns: int = 72) -> str:
        """Draw the compute of each worker as text; a column is one ``columns``-th of the makespan.

        A forward prints its microbatch's last digit, a backward the letter of the same number (0 is ``a``; a weight
        gradient apart from it the capital), idle ``.``.
        """
        makespan_s = self.makespan_s
        if not makespan_s:
            return ""
        rows: defaultdict[int, list[str]] = defaultdict(lambda: ["."] * columns)
        for span in self.spans:
            if span.op not in COMPUTE_NAMES:
                continue
            first = min(int(span.start_s / makespan_s * columns), columns - 1)
            last = max(first + 1, round(span.end_s / makespan_s * columns))
            mark = str(span.microbatch % 10) if span.op == "F" else chr(ord("a") + span.microbatch % 10)
            mark = mark.upper() if span.op == "W" else mark
            for column in range(first, min(last, columns)):
                rows[span.worker][column] = mark
        return "\n".join(f"worker {w:<3} {''.join(rows[w])}" for w in range(self.n_workers))


def order_grid(orders: tuple[tuple[object, ...], ...]) -> str:
    """Print compute orders one worker a line, in order, without times.

    >>> from stagecut.runtime.instructions import Action
    >>> print(order_grid(((Action("F", 0, 0), Action("B", 0, 0)),)))
    worker 0   F0.0 B0.0
    """
    return "\n".join(f"worker {w:<3} {' '.join(str(action) for action in order)}" for w, order in enumerate(orders))
