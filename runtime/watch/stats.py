"""What a pipeline did so far: counts of all workers added up, as plain data that prints as a table."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..requests import BACKWARD, TRAIN, StepReport, StepRequest
from .counts import StepCounts
from .residents import Resident

_LATEST = 100  # steps that medians are of
_HEAD = (
    "worker",
    "device",
    "pid",
    "steps",
    "step",
    "busy",
    "waiting",
    "reducing",
    "sent",
    "received",
    "memory",
    "peak",
)


@dataclass(frozen=True)
class WorkerStats:
    """What one worker did since its plan began to run.

    Attributes:
        worker, device, pid: who it is; a process may be home to several workers (``launch="inline"``).
        n_steps: training steps that it completed.
        step_s: median seconds of its latest 100 calls of ``pm.step``, from its first instruction to its last.
        busy_s: seconds in which it computed, packed and freed; on CUDA, in which it kept the host busy.
        waiting_s: seconds within steps in which it waited for packets of other workers.
        reduce_s: seconds in which it summed gradients over replicas, waiting for them included.
        sent_bytes, received_bytes, n_sent, n_received: packets to and from other workers.
        memory_bytes, peak_memory_bytes: of its process, now and at most: resident memory, or what torch has allocated
            on a CUDA device; None where nobody can say.
    """

    worker: int
    device: str
    pid: int | None
    n_steps: int
    step_s: float | None
    busy_s: float
    waiting_s: float
    reduce_s: float
    sent_bytes: int
    received_bytes: int
    n_sent: int
    n_received: int
    memory_bytes: int | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Stats:
    """What a pipeline did since its plan began to run.

    Attributes:
        n_steps: training steps: calls of ``pm.step``, and backwards of ``pm(x)``.
        n_calls: all that workers were asked for: steps, forwards, backwards, evaluations.
        n_restarts: how often workers were started again, because one was lost or after an error, whatever the plan.
        n_nonfinite: calls in which ``check_finite`` found something.
        step_s: median seconds of the latest 100 calls of ``pm.step``, from handing the batch over to the last answer.
        predicted_step_s: what the plan says of a step; with the optimizer's where that was asked for.
        workers: one each.
    """

    n_steps: int
    n_calls: int
    n_restarts: int
    n_nonfinite: int
    step_s: float | None
    predicted_step_s: float | None
    workers: tuple[WorkerStats, ...]

    def __str__(self) -> str:
        took = "no step timed yet" if self.step_s is None else f"median step {_ms(self.step_s)}"
        planned = "" if self.predicted_step_s is None else f", predicted {_ms(self.predicted_step_s)}"
        head = f"{self.n_steps} steps in {self.n_calls} calls, {took}{planned}, {self.n_restarts} restarts"
        if self.n_nonfinite:
            head += f", {self.n_nonfinite} not finite"
        rows = [_HEAD, *(_row(worker) for worker in self.workers)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join([head, *("  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows)])


def _row(w: WorkerStats) -> tuple[str, ...]:
    sent, received = f"{_size(w.sent_bytes)} in {w.n_sent}", f"{_size(w.received_bytes)} in {w.n_received}"
    times = (_ms(w.step_s), f"{w.busy_s:.2f} s", f"{w.waiting_s:.2f} s", f"{w.reduce_s:.2f} s")
    who = (str(w.worker), w.device, "?" if w.pid is None else str(w.pid), str(w.n_steps))
    return (*who, *times, sent, received, _size(w.memory_bytes), _size(w.peak_memory_bytes))


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(n_bytes: float | None) -> str:
    if n_bytes is None:
        return "?"
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} GiB"


@dataclass
class _Sum:
    """One worker's counts, added up."""

    total: StepCounts = field(default_factory=StepCounts)
    n_steps: int = 0
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATEST))

    def add(self, counts: StepCounts, kind: str) -> None:
        total = self.total
        total.busy_s += counts.busy_s
        total.waiting_s += counts.waiting_s
        total.reduce_s += counts.reduce_s
        total.sent_bytes += counts.sent_bytes
        total.n_sent += counts.n_sent
        total.received_bytes += counts.received_bytes
        total.n_received += counts.n_received
        if kind == TRAIN:
            self.steps_s.append(counts.step_s)
        self.n_steps += kind in (TRAIN, BACKWARD)


class Tally:
    """The counts of the workers that this process hears of."""

    def __init__(self, devices: tuple[str, ...] = (), predicted_step_s: float | None = None) -> None:
        self._devices = devices
        self._predicted_step_s = predicted_step_s
        self._sums: dict[int, _Sum] = {}
        self._steps_s: deque[float] = deque(maxlen=_LATEST)
        self._n_steps = self._n_calls = 0
        self.n_nonfinite = 0

    def add(self, request: StepRequest, report: StepReport, seconds: float) -> None:
        """Count one call that took so many seconds."""
        self._n_calls += 1
        self._n_steps += request.kind in (TRAIN, BACKWARD)
        if request.kind == TRAIN:
            self._steps_s.append(seconds)
        for worker, counts in report.counts.items():
            if worker not in self._sums:
                self._sums[worker] = _Sum()
            self._sums[worker].add(counts, request.kind)

    def rows(self, residents: Mapping[int, Resident]) -> list[WorkerStats]:
        """Return a record for each worker that was heard of, or whose process is known."""
        return [self._row(w, residents.get(w)) for w in sorted({*self._sums, *residents})]

    def _row(self, worker: int, home: Resident | None) -> WorkerStats:
        own = self._sums.get(worker, _Sum())
        total = own.total
        return WorkerStats(
            worker=worker,
            device=self._devices[worker] if worker < len(self._devices) else "?",
            pid=None if home is None else home.pid,
            n_steps=own.n_steps,
            step_s=statistics.median(own.steps_s) if own.steps_s else None,
            busy_s=total.busy_s,
            waiting_s=total.waiting_s,
            reduce_s=total.reduce_s,
            sent_bytes=total.sent_bytes,
            received_bytes=total.received_bytes,
            n_sent=total.n_sent,
            n_received=total.n_received,
            memory_bytes=None if home is None else home.memory_bytes,
            peak_memory_bytes=None if home is None else home.peak_memory_bytes,
        )

    def stats(self, rows: Iterable[WorkerStats], n_restarts: int) -> Stats:
        """Return all of it."""
        return Stats(
            n_steps=self._n_steps,
            n_calls=self._n_calls,
            n_restarts=n_restarts,
            n_nonfinite=self.n_nonfinite,
            step_s=statistics.median(self._steps_s) if self._steps_s else None,
            predicted_step_s=self._predicted_step_s,
            workers=tuple(sorted(rows, key=lambda row: row.worker)),
        )
