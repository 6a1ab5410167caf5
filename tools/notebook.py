"""Plans, timelines, pipelines and captures as HTML for notebooks: pictures and tables without scripts."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import StagecutError
from ..partitioner.plan import Plan, StageRecord
from .notebook_parts import fitting, heading, note, picture, table
from .svg import graph_svg, plan_svg
from .tables import Table, alternatives_table, stage_table, wire_table
from .verdict import judge
from .words import clean, count, duration, share

if TYPE_CHECKING:
    from ..partitioner.captured import Capture
    from ..runtime.pipeline import Pipeline
    from ..runtime.program import Timeline

_HEIGHT = 760
_WIDTH = 1180.0


@dataclass(frozen=True)
class Interactive:
    """A page that a notebook shows in a frame of its own, which can reach neither the notebook nor the network."""

    page: str

    def _repr_html_(self) -> str:
        source = html.escape(self.page, quote=True)
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{source}" width="100%" height="{_HEIGHT}" '
            'style="border:0" title="stagecut plan"></iframe>'
        )


def interactive(plan: Plan) -> Interactive:
    """Return the report of ``plan``, to be the last line of a cell."""
    return Interactive(_page(plan))


def _page(plan: Plan) -> str:
    from .report import Shown, report_html

    return report_html([Shown(plan.model, plan)])


def plan_html(plan: Plan) -> str:
    """Draw a plan: what it says, the cut and a step, and its tables; at most some 300 kB, equal plans equal bytes."""
    timeline = plan.predicted
    verdict = judge(plan, timeline)
    head = heading(f"{plan.model}: {verdict.line()}")
    tables = [
        *(heading("stages, costs of one microbatch"), table(stage_table(plan))),
        *(heading("what crosses"), table(wire_table(plan))),
        *(heading("what was considered"), table(alternatives_table(plan))),
        note("stagecut.tools.notebook.interactive(plan) shows the whole report"),
    ]
    pictures = [lambda: picture(plan_svg(plan, timeline)), lambda: picture(graph_svg(plan))]
    return fitting([head], pictures, tables, "; plan.save('plan.json') and partition-viz report draw it")


def pipeline_html(pipeline: Pipeline) -> str | None:
    """Draw the plan that a pipeline runs; None before it has one."""
    try:
        plan = pipeline.plan
    except StagecutError:  # it says so in its text too
        return None
    return plan_html(plan)


def timeline_html(timeline: Timeline) -> str:
    """Draw a step, with a table of the workers."""
    from .draw_timeline import draw_timelines
    from .svg_parts import document, stack

    title = f"{timeline.source} step: {duration(timeline.makespan_s)}, bubble {share(timeline.bubble)}"
    bare = _bare_plan(timeline)
    return fitting(
        [] if timeline.makespan_s else [heading(title)],
        [lambda: picture(document(stack([draw_timelines(bare, [timeline], _WIDTH)], margin=14.0), title, styled=True))],
        [table(_workers_table(timeline))],
        "",
    )


def capture_html(capture: Capture) -> str:
    """Draw the graph of a captured model by its modules, with what was kept whole."""
    from .draw_capture import capture_svg

    lines = [clean(line) for line in capture.report().split("\n")]
    return fitting(
        [heading(lines[0])],
        [lambda: picture(capture_svg(capture))],
        [f"<pre>{html.escape(chr(10).join(lines[1:]))}</pre>"] if lines[1:] else [],
        "",
    )


def _workers_table(timeline: Timeline) -> Table:
    rows = tuple(
        (
            str(worker),
            ", ".join(map(str, _stages(timeline, worker))),
            duration(timeline.busy_s(worker)),
            share(1 - timeline.busy_s(worker) / timeline.makespan_s) if timeline.makespan_s else "",
            str(timeline.peak_in_flight(worker)),
        )
        for worker in range(timeline.n_workers)
    )
    header = ("worker", "stages", "computes", "no compute", "in flight")
    return Table(header, (True, True, True, True, True), rows, "there are no workers")


def _stages(timeline: Timeline, worker: int) -> Sequence[int]:
    return sorted({span.stage for span in timeline.spans if span.worker == worker and span.stage >= 0})


def _bare_plan(timeline: Timeline) -> Plan:
    """Make what the drawing of a step asks a plan for: who owns which stage.

    A timeline does not know the names of devices; in their place stands how much of the time each worker computes.
    """
    from ..partitioner.plan import FORMAT, Prediction

    owners: dict[int, list[int]] = {}
    for worker in range(timeline.n_workers):
        for stage in _stages(timeline, worker):
            owners.setdefault(stage, []).append(worker)
    stages = tuple(
        StageRecord(
            index=stage,
            devices=tuple(share(timeline.busy_s(worker) / (timeline.makespan_s or 1.0)) for worker in workers),
            workers=tuple(workers),
            forward_s=0.0,
            backward_s=0.0,
            parameter_bytes=0,
            saved_bytes=0,
            in_flight=0,
            memory_bytes=0,
            memory_limit_bytes=0.0,
        )
        for stage, workers in sorted(owners.items())
    )
    nothing = Prediction(timeline.makespan_s, timeline.bubble, 0.0, 0.0, False, 0.0, "none")
    what = f"{timeline.source} step of {count(timeline.n_workers, 'worker')}"
    return Plan(FORMAT, what, "", 0, 0, "", (), (), stages, (), nothing, ())
