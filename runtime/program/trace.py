"""A timeline as a trace that chrome://tracing and Perfetto show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..instructions import INPUT_GRADIENTS, Layout, Op
from .timeline import COMPUTE_NAMES, Span, Timeline

Memory = Mapping[int, Sequence[tuple[float, float]]]
_MICRO = 1e6


def chrome_trace(
    timeline: Timeline,
    memory: Memory | None = None,
    layout: Layout | None = None,
    measured: Timeline | None = None,
) -> dict[str, Any]:
    """Return a timeline in the "Trace Event Format" of the Chromium project, as plain values; times in microseconds.

    A thread for each worker, a slice for each instruction that took time; ``memory`` adds a counter for each worker:
    pairs of seconds and the bytes held from then on (:func:`stagecut.partitioner.residency.memory_over_time`).
    ``layout`` adds an arrow for each packet, from its sending to the computation on another worker that uses it.
    A ``measured`` step of the same layout is a process of its own beside the first.
    """
    steps = [timeline] if measured is None else [timeline, measured]
    events = [event for process, step in enumerate(steps) for event in _slices(step, process)]
    for worker, changes in (memory or {}).items():
        for second, n_bytes in changes:
            counter = {"ph": "C", "name": f"bytes on worker {worker}", "pid": 0, "ts": second * _MICRO}
            events.append({**counter, "args": {"held": n_bytes}})
    if layout is not None:
        # An arrow belongs to the slice that is open at its time, so it stands behind the slices in the file.
        packets = [(process, *packet) for process, step in enumerate(steps) for packet in _packets(step, layout)]
        events += [event for number, packet in enumerate(packets) for event in _arrow(number, *packet)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _slices(timeline: Timeline, process: int) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": f"{timeline.source} step"}}
    for worker in range(timeline.n_workers):
        name = {"name": f"worker {worker}"}
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": worker, "args": name}
    for span in timeline.spans:
        what = COMPUTE_NAMES.get(span.op, span.op)
        whose = {"stage": span.stage} | ({"microbatch": span.microbatch} if span.microbatch >= 0 else {})
        label = f"{span.op}{span.stage}.{span.microbatch}" if span.op in COMPUTE_NAMES else what
        took = {"ts": span.start_s * _MICRO, "dur": (span.end_s - span.start_s) * _MICRO}
        yield {"ph": "X", "name": label, "cat": what, "pid": process, "tid": span.worker, **took, "args": whose}


def _arrow(number: int, process: int, what: str, start: Span, end: Span) -> Iterator[dict[str, Any]]:
    """Tie two slices together: both ends have one category, name and id, and each lies at its slice's beginning.

    A packet can be used before its sender is done with it, but not before it has begun.
    """
    common = {"name": what, "cat": "packet", "id": number, "pid": process}
    yield {"ph": "s", **common, "tid": start.worker, "ts": start.start_s * _MICRO}
    yield {"ph": "f", "bp": "e", **common, "tid": end.worker, "ts": end.start_s * _MICRO}


def _packets(timeline: Timeline, layout: Layout) -> Iterator[tuple[str, Span, Span]]:
    """Give what every packet between workers is, what sends it, and the computation that uses it.

    A worker sends to stages in the layout's order. Where sending took no time, and so is no span, what made the packet
    stands for it.
    """
    computed: dict[tuple[bool, int, int], Span] = {}  # is it a backward, stage, microbatch
    sent: dict[tuple[bool, int, int], list[Span]] = {}
    for span in sorted(timeline.spans, key=lambda span: span.start_s):
        if span.op == Op.FORWARD or span.op in INPUT_GRADIENTS:
            computed[span.op != Op.FORWARD, span.stage, span.microbatch] = span
        elif span.op in (Op.SEND_ACT, Op.SEND_GRAD):
            sent.setdefault((span.op == Op.SEND_GRAD, span.stage, span.microbatch), []).append(span)
    for (back, s, m), made in computed.items():
        peers = layout.producers(s, gradients=True) if back else layout.consumers(s)
        others = [peer for peer in peers if layout.worker_of(peer, m) != made.worker]
        sends = sent.get((back, s, m), [])
        for peer, send in zip(others, sends if len(sends) == len(others) else [made] * len(others)):
            if (back, peer, m) in computed:
                yield ("gradient" if back else "activation"), send, computed[back, peer, m]
