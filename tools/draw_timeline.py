"""The picture of a step: a lane for each worker, with what it computes, what it sends and where it waits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..partitioner.plan import Plan
from ..runtime.program import Span, Timeline
from ..runtime.program.timeline import COMPUTE_NAMES
from .draw_graph import HEADER
from .style import stage_class
from .svg_parts import Drawing, path, rect, text
from .verdict import idle_s, occupied, stages_of
from .words import clean, duration, share, shorten

_LANE, _PITCH = 24.0, 29.0
_RIGHT = 104.0
_DIGIT = 6.5
_WAITS_TEXT = 84.0
_HEAD, _FOOT = 24.0, 22.0
_TICKS = 10
_OTHER = ("reduce", "optimizer")


def draw_timelines(plan: Plan, timelines: Sequence[Timeline], width: float) -> Drawing:
    """Draw timelines of one plan under each other, on one axis."""
    longest = max((timeline.makespan_s for timeline in timelines), default=0.0)
    scale = (width - HEADER - _RIGHT) / longest if longest > 0 else 0.0
    parts, y = [_key(plan, width)], _HEAD
    for timeline in timelines:
        title = f"{timeline.source} step: {duration(timeline.makespan_s)}, bubble {share(timeline.bubble)}"
        parts.append(text("h", 0, y - 8, title))
        for worker in range(timeline.n_workers):
            parts.append(_lane(plan, timeline, worker, y, scale))
            y += _PITCH
        parts.append(_axis(longest, scale, y))
        y += _FOOT + _HEAD
    return Drawing(width, y - _HEAD, "\n".join(parts))


def _key(plan: Plan, width: float) -> str:
    """Explain the colours, at the right of the first title."""
    colour = stage_class(0)
    items = [(f"fwd {colour}", "forward"), (f"bwd {colour}", "backward"), ("send", "sends"), ("lane", "waits")]
    if any(len(stage.devices) > 1 for stage in plan.stages):
        items.insert(3, ("other", "sums gradients of replicas"))
    numbers = "number: microbatch"
    x = width - 8 - _DIGIT * len(numbers) - sum(30 + _DIGIT * len(name) for _, name in items)
    parts = []
    for kind, name in items:
        y, height = (13, 4) if kind == "send" else (6, 11)
        parts.append(rect(kind, x, y, 16, height) + text("dim", x + 20, 15.5, name))
        x += 30 + _DIGIT * len(name)
    return "".join(parts) + text("dim", x, 15.5, numbers)


def _lane(plan: Plan, timeline: Timeline, worker: int, y: float, scale: float) -> str:
    end = timeline.makespan_s
    idle = idle_s(timeline, worker)
    waits = f"waits {share(idle / end)}" if end else ""
    parts = [
        text("b", 0, y + 16, f"worker {worker}"),
        text("dim", 58, y + 16, shorten(_owned(plan, worker), 15)),
        rect("lane", HEADER, y, end * scale, _LANE),
        text("", HEADER + end * scale + 8, y + 16, waits),
    ]
    until = 0.0
    for span in [*occupied(timeline, worker), Span(worker, "", 0, 0, end, end)]:
        gap = (span.start_s - until) * scale
        if gap > _WAITS_TEXT:
            middle = HEADER + (until + span.start_s) / 2 * scale
            parts.append(text("dim s m", middle, y + 15.5, f"waits {duration(span.start_s - until)}"))
        until = max(until, span.end_s)
        if span.op:
            parts.append(_span(span, y, scale))
    return "".join(parts)


def _owned(plan: Plan, worker: int) -> str:
    """Name a worker's stages; and its device, where it has one stage and there is room."""
    device = plan.devices[worker] if worker < len(plan.devices) else ""
    stages = stages_of(plan, worker)
    return f"{stages}, {clean(device)}" if stages.startswith("stage ") else stages


def _span(span: Span, y: float, scale: float) -> str:
    x, width = HEADER + span.start_s * scale, (span.end_s - span.start_s) * scale
    what = COMPUTE_NAMES.get(span.op, span.op)
    whose = f", microbatch {span.microbatch}" if span.microbatch >= 0 else ""
    whose += f", stage {span.stage}" if span.stage >= 0 else ""
    tip = f"{what}{whose}: {duration(span.end_s - span.start_s)}, from {duration(span.start_s)}"
    if span.op not in COMPUTE_NAMES:
        if span.op in _OTHER:
            return rect("other", x, y + 5, width, _LANE - 10, tip=tip)
        return rect("send", x, y + _LANE - 6, width, 5, tip=tip) if span.op.startswith("send") else ""
    colour = stage_class(span.stage)
    forward = span.op == "F"
    shape = rect(f"{'fwd' if forward else 'bwd'} {colour}", x, y + 0.5, width, _LANE - 1, tip=tip)
    label = str(span.microbatch)
    if width < len(label) * _DIGIT + 2:
        return shape
    return shape + text("m" if forward else f"m on {colour}", x + width / 2, y + 16, label)


def _axis(longest_s: float, scale: float, y: float) -> str:
    if longest_s <= 0:
        return ""
    step = _tick_s(longest_s)
    parts = [path("rule", [(HEADER, y), (HEADER + longest_s * scale, y)])]
    for index in range(int(longest_s / step + 1e-9) + 1):
        x = HEADER + index * step * scale
        parts.append(path("rule", [(x, y), (x, y + 4)]))
        unit = " ms" if index == 0 else ""
        parts.append(text("dim s m", x, y + 15, f"{index * step * 1e3:.6g}{unit}"))
    return "".join(parts)


def _tick_s(longest_s: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that gives at most ``_TICKS`` ticks.

    >>> _tick_s(0.0097), _tick_s(3.2)
    (0.001, 0.5)
    """
    power = 10.0 ** math.floor(math.log10(longest_s / _TICKS))
    return next(power * m for m in (1, 2, 5, 10) if power * m * _TICKS >= longest_s * (1 - 1e-9))
