"""A timeline as a trace that chrome://tracing and Perfetto show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .timeline import Timeline

_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def chrome_trace(
    timeline: Timeline, memory: Mapping[int, Sequence[tuple[float, float]]] | None = None
) -> dict[str, Any]:
    """Return a timeline in the "Trace Event Format" of the Chromium project, as plain values; times in microseconds.

    A thread for each worker, a slice for each instruction that took time; ``memory`` adds a counter for each worker:
    pairs of seconds and the bytes held from then on (:func:`stagecut.partitioner.residency.memory_over_time`).
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": f"{timeline.source} step"}}
    ]
    for worker in range(timeline.n_workers):
        name = {"ph": "M", "name": "thread_name", "pid": 0, "tid": worker, "args": {"name": f"worker {worker}"}}
        events.append(name)
    for span in timeline.spans:
        what = _NAMES.get(span.op, span.op)
        whose = {"stage": span.stage} | ({"microbatch": span.microbatch} if span.microbatch >= 0 else {})
        label = f"{span.op}{span.stage}.{span.microbatch}" if span.op in _NAMES else what
        place = {"pid": 0, "tid": span.worker, "ts": span.start_s * 1e6, "dur": (span.end_s - span.start_s) * 1e6}
        events.append({"ph": "X", "name": label, "cat": what, **place, "args": whose})
    for worker, steps in (memory or {}).items():
        for second, n_bytes in steps:
            counter = {"ph": "C", "name": f"bytes on worker {worker}", "pid": 0, "ts": second * 1e6}
            events.append({**counter, "args": {"held": n_bytes}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
