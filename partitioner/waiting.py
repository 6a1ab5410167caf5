"""Why workers wait in a timeline, and the chain of work that is as long as its step."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..runtime.instructions import Op
from ..runtime.program import Span, Timeline

if TYPE_CHECKING:
    from .plan import Plan

FILLING, DRAINING, WORK, TRANSFER, REPLICAS, RUNTIME = CAUSES = (
    "filling",
    "draining",
    "another stage",
    "a transfer",
    "replicas",
    "the runtime",
)
_COMPUTE = ("F", "B", "I", "W")
_WHOLE_BATCH = ("reduce", "optimizer")
SEND_FORWARD, SEND_BACKWARD = Op.SEND_ACT.value, Op.SEND_GRAD.value
_EPS = 1e-12


@dataclass(frozen=True)
class Wait:
    """A stretch of time in which a worker does nothing, and what it waits for.

    ``cause`` is one of :data:`CAUSES`: *filling* before a worker's first computation, *draining* after its last work,
    *another stage* until what it needs is computed, *a transfer* until that has come, *replicas* until the others of
    its stage are there to reduce gradients, *the runtime* where all was there and nothing ran yet.
    ``awaited`` is the span of another worker that it waits for, by its place in the timeline; -1 for none.
    """

    worker: int
    start_s: float
    end_s: float
    cause: str
    awaited: int = -1


def waits(plan: Plan, timeline: Timeline) -> list[Wait]:
    """List what every worker of ``timeline`` waits for, by worker and time; O(spans x log spans)."""
    found: list[Wait] = []
    graph = _Order(plan, timeline)
    for worker in range(timeline.n_workers):
        until, computed = 0.0, False
        for index in graph.busy[worker]:
            span = timeline.spans[index]
            if span.start_s - until > _EPS:
                found += graph.causes(worker, until, index, computed)
            computed = computed or span.op in _COMPUTE
            until = max(until, span.end_s)
        if timeline.makespan_s - until > _EPS:
            found.append(Wait(worker, until, timeline.makespan_s, DRAINING))
    return found


def critical_path(plan: Plan, timeline: Timeline) -> list[int]:
    """Return the spans, by their places in the timeline, first to last, of a chain that lasts as long as the step.

    Each begins when the one before it was over: the work before it on its worker, or what it needed from another,
    whichever was later. Time between two of them is a transfer or the runtime's.
    """
    graph = _Order(plan, timeline)
    busy = [index for own in graph.busy.values() for index in own]
    if not busy:
        return []
    at: int | None = max(busy, key=lambda index: (timeline.spans[index].end_s, -index))
    path: list[int] = []
    while at is not None:
        path.append(at)
        at = graph.before(at)
    return path[::-1]


class _Order:
    """What comes before what: on a worker by time, across workers by what a computation needs."""

    def __init__(self, plan: Plan, timeline: Timeline) -> None:
        self.timeline = timeline
        self.busy: defaultdict[int, list[int]] = defaultdict(list)
        self.of: dict[tuple[str, int, int], int] = {}
        self.reductions: defaultdict[int, list[int]] = defaultdict(list)
        self.sent: dict[tuple[int, str, int, int], float] = {}
        self.travels_s = _travels_s(plan)
        layout = plan.layout()
        self.inputs: defaultdict[int, list[int]] = defaultdict(list)
        self.gradients: defaultdict[int, list[int]] = defaultdict(list)
        for source, target in layout.wires:
            self.inputs[target].append(source)
        for source, target in layout.gradient_wires:
            self.gradients[source].append(target)
        for index, span in enumerate(timeline.spans):
            if span.end_s > span.start_s and (span.op in (*_COMPUTE, *_WHOLE_BATCH) or span.op.startswith("send")):
                self.busy[span.worker].append(index)
            if span.op in _COMPUTE:
                self.of[span.op, span.stage, span.microbatch] = index
            if span.op == "reduce":
                self.reductions[span.stage].append(index)
            if span.op.startswith("send"):
                key = (span.worker, span.op, span.stage, span.microbatch)
                self.sent[key] = max(self.sent.get(key, 0.0), span.end_s)
        for own in self.busy.values():
            own.sort(key=lambda index: (timeline.spans[index].start_s, timeline.spans[index].end_s, index))
        self.place = {index: place for own in self.busy.values() for place, index in enumerate(own)}
        self.ends = {worker: [timeline.spans[index].end_s for index in own] for worker, own in self.busy.items()}

    def needed(self, index: int) -> int | None:
        """Return the span of another worker that a computation waited for: the latest of those it needs."""
        span = self.timeline.spans[index]
        if span.op == "F":
            found = [self.of.get(("F", source, span.microbatch)) for source in self.inputs[span.stage]]
        elif span.op in ("B", "I"):
            found = [
                self.of.get((op, target, span.microbatch)) for target in self.gradients[span.stage] for op in ("B", "I")
            ]
        else:
            return None
        others = [i for i in found if i is not None and self.timeline.spans[i].worker != span.worker]
        return max(others, key=lambda i: self.timeline.spans[i].end_s, default=None)

    def causes(self, worker: int, start_s: float, index: int, computed: bool) -> list[Wait]:
        """Say why a worker waits from ``start_s`` until the span ``index``."""
        span, awaited = self.timeline.spans[index], self.needed(index)
        if not computed:
            return [Wait(worker, start_s, span.start_s, FILLING, -1 if awaited is None else awaited)]
        if span.op == "reduce" and len(self.reductions[span.stage]) > 1:
            return [Wait(worker, start_s, span.start_s, REPLICAS)]
        if awaited is None:
            return [Wait(worker, start_s, span.start_s, RUNTIME)]
        ready_s = min(max(self.timeline.spans[awaited].end_s, start_s), span.start_s)
        found = [Wait(worker, start_s, ready_s, WORK, awaited)] if ready_s - start_s > _EPS else []
        if span.start_s - ready_s > _EPS:
            cause = RUNTIME if self._had_come(awaited, span, start_s) else TRANSFER
            found.append(Wait(worker, ready_s, span.start_s, cause, awaited))
        return found

    def _had_come(self, awaited: int, span: Span, now: float) -> bool:
        """Say whether a measured packet must have been there: in a simulation all runs as soon as it can."""
        if self.timeline.source == "simulated":
            return False
        source = self.timeline.spans[awaited]
        sending = SEND_FORWARD if source.op == "F" else SEND_BACKWARD
        sent_s = max(self.sent.get((source.worker, sending, source.stage, source.microbatch), 0.0), source.end_s)
        return sent_s + self.travels_s.get((source.stage, span.stage), 0.0) <= now

    def before(self, index: int) -> int | None:
        """Return what a span began after: its worker's last work before it, or what it needed, whichever was later."""
        span = self.timeline.spans[index]
        own, ends = self.busy[span.worker], self.ends[span.worker]
        place = bisect_right(ends, span.start_s + _EPS, hi=self.place[index])
        previous = own[place - 1] if place > 0 else None
        if span.op == "reduce":
            ahead = [i for i in map(self._ahead, self.reductions[span.stage]) if i is not None]
            return max(ahead, key=lambda i: (self.timeline.spans[i].end_s, -i), default=previous)
        needed = self.needed(index)
        if needed is None or previous is None:
            return previous if needed is None else needed
        until = self.timeline.spans[previous].end_s
        if span.start_s - until <= _EPS or self._had_come(needed, span, until):
            return previous
        return needed

    def _ahead(self, index: int) -> int | None:
        """Return the work of a worker that ends last before a reduction begins there."""
        span: Span = self.timeline.spans[index]
        own = [i for i in self.busy[span.worker] if self.timeline.spans[i].end_s <= span.start_s + _EPS]
        return own[-1] if own else None


def _travels_s(plan: Plan) -> dict[tuple[int, int], float]:
    """Return, per pair of stages, how long one packet is on its way."""
    n_bytes: defaultdict[tuple[int, int], int] = defaultdict(int)
    for wire in plan.wires:
        for target in wire.targets:
            n_bytes[wire.source, target] += wire.n_bytes
            if wire.gradient:
                n_bytes[target, wire.source] += wire.n_bytes
    found = {}
    for link in plan.timing.links:
        for pair in ((link.source, link.target), (link.target, link.source)):
            found[pair] = link.latency_s + n_bytes[pair] / link.bytes_per_s
    return found
