"""Pictures of a plan as SVG: the cut, a step on the time axis, or both in one file."""

from __future__ import annotations

from ..partitioner.plan import Plan
from ..runtime.program import Timeline
from .draw_graph import draw_graph
from .draw_timeline import draw_timelines
from .svg_parts import Drawing, document, stack, text
from .verdict import judge
from .words import clean


def graph_svg(plan: Plan, *, styled: bool = True) -> str:
    """Draw the op graph of ``plan`` by stages; not ``styled``, for a page that has the style sheet."""
    return document(draw_graph(plan), f"{plan.model}: the cut", styled=styled)


def timeline_svg(
    plan: Plan, timeline: Timeline, measured: Timeline | None = None, *, width: float = 1180.0, styled: bool = True
) -> str:
    """Draw one step of ``plan``, a ``measured`` one under it on the same axis."""
    timelines = [timeline] if measured is None else [timeline, measured]
    return document(draw_timelines(plan, timelines, width), f"{plan.model}: one step", styled=styled)


def plan_svg(plan: Plan, timeline: Timeline, measured: Timeline | None = None) -> str:
    """Draw a plan as one standalone picture: what it says, the cut, and the timeline of a step.

    Equal plans give equal bytes.
    """
    graph = draw_graph(plan)
    timelines = [timeline] if measured is None else [timeline, measured]
    parts = [_head(plan, timeline, graph.width), graph, draw_timelines(plan, timelines, graph.width)]
    return document(stack(parts, margin=14.0), f"{plan.model}: plan", styled=True)


def _head(plan: Plan, timeline: Timeline, width: float) -> Drawing:
    verdict = judge(plan, timeline)
    title = text("h", 0, 14, f"{clean(plan.model)}: {verdict.step}")
    rivals = "; ".join(filter(None, (verdict.one_device, verdict.data_parallel)))
    lines = [f"{verdict.limit}; {rivals}", f"{verdict.crossing}; {verdict.fit}"]
    body = title + "".join(text("", 0, 32 + 16 * index, line) for index, line in enumerate(lines))
    return Drawing(width, 32 + 16 * len(lines) - 8, body)
