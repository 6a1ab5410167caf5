"""The report where no script runs: a plan as pictures and tables of HTML, with nothing to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from ...partitioner.plan import OpRecord, Plan
from ...runtime.program import Timeline
from ..draw_graph import draw_graph
from ..draw_timeline import draw_timelines
from ..svg_parts import Drawing, document, escape
from ..tables import Table, alternatives_table, stage_table, wire_table
from ..verdict import Verdict, judge, sent_to
from ..words import count, duration, share, size

_SLOWEST = 20


def static_body(plan: Plan, timeline: Timeline, measured: Timeline | None = None) -> str:
    """Write ``plan`` as headings, pictures and tables, with a ``measured`` timeline under the simulated one."""
    verdict = judge(plan, timeline)
    graph = draw_graph(plan)
    parts = [
        f"<h1>{escape(plan.model)}: {count(len(plan.stages), 'stage')}, {escape(plan.schedule)}</h1>",
        f"<p>{escape(_sentence(verdict.line()))}</p>",
        _cards(plan, verdict, timeline),
        _section("Where it is cut", _picture(graph, f"{plan.model}: the cut")),
        _section("When who works", _timelines(plan, timeline, measured, graph.width)),
        _section("Stages", _table(stage_table(plan))),
        _section("What crosses", _table(wire_table(plan))),
        _section("What else was considered", _table(alternatives_table(plan))),
        _folded(f"The {min(_SLOWEST, len(plan.ops))} slowest of {len(plan.ops)} ops", _table(_slowest(plan))),
        _folded("Where the numbers come from", _sources(plan, timeline)),
    ]
    return "\n".join(parts)


def _cards(plan: Plan, verdict: Verdict, timeline: Timeline) -> str:
    p = plan.prediction
    crossing = sum(wire.n_bytes * len(sent_to(plan, wire)) for wire in plan.wires)
    fits = verdict.fit.partition(":")[0]
    cards = [
        ("A step takes", duration(p.step_s), "; ".join(filter(None, (verdict.one_device, verdict.data_parallel)))),
        ("It is cut into", count(len(plan.stages), "stage"), f"{verdict.cut}; {verdict.limit}"),
        ("Crosses for a microbatch", size(crossing), verdict.crossing),
        ("Who waits", share(timeline.bubble), verdict.waiting),
        ("Memory", fits, verdict.fit.partition(": ")[2]),
    ]
    shown = "".join(
        f'<section class="card"><h2>{title}</h2><b>{escape(value)}</b><p>{escape(note)}</p></section>'
        for title, value, note in cards
    )
    return f'<div class="cards">{shown}</div>'


def _picture(drawing: Drawing, title: str) -> str:
    return f'<div class="wide">{document(drawing, title, styled=False)}</div>'


def _timelines(plan: Plan, timeline: Timeline, measured: Timeline | None, width: float) -> str:
    timelines = [timeline] if measured is None else [timeline, measured]
    picture = _picture(draw_timelines(plan, timelines, width), f"{plan.model}: one step")
    if measured is None:
        return picture
    off = (
        f", {measured.makespan_s / timeline.makespan_s - 1:+.0%} against the simulated one"
        if timeline.makespan_s
        else ""
    )
    return f"{picture}<p>The measured step took {duration(measured.makespan_s)}{off}.</p>"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _folded(title: str, content: str) -> str:
    return f"<details>\n<summary>{escape(title)}</summary>\n{content}\n</details>"


def _table(table: Table) -> str:
    if not table.rows:
        return f"<p>{escape(table.empty)}</p>"
    head = "".join(_cell("th", name, right) for name, right in zip(table.header, table.right))
    rows = ["".join(_cell("td", value, right) for value, right in zip(row, table.right)) for row in table.rows]
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def _cell(tag: str, value: str, right: bool) -> str:
    return f'<{tag} class="right">{escape(value)}</{tag}>' if right else f"<{tag}>{escape(value)}</{tag}>"


def _slowest(plan: Plan) -> Table:
    ops = sorted(plan.ops, key=lambda op: (-(op.forward_s + op.backward_s), op.name))[:_SLOWEST]
    header = ("op", "what", "module", "where", "stage", "forward", "backward", "saved", "result")
    return Table(header, (False,) * 4 + (True,) * 5, tuple(map(_op_row, ops)), "the plan has no ops")


def _op_row(op: OpRecord) -> tuple[str, ...]:
    what = "module" if op.target == op.module_path else op.target
    # The last part only: a page that is passed on does not tell where its author's files are.
    where = PurePath(op.source).name if op.source else ""
    costs = (duration(op.forward_s), duration(op.backward_s), size(op.saved_bytes), size(op.output_bytes))
    return (op.name, what, op.module_path, where, str(op.stage), *costs)


def _sources(plan: Plan, timeline: Timeline) -> str:
    kinds: Sequence[str] = sorted({op.cost_source for op in plan.ops})
    facts = [
        f"costs of the ops: {', '.join(kinds)}; the first timeline is {timeline.source} from their sums",
        f"bottleneck {duration(plan.prediction.bottleneck_s)} a microbatch with its transfers, proven lower bound "
        f"{duration(plan.prediction.lower_bound_s)}",
        "memory: parameters with gradients and optimizer state, and what is saved for the microbatches in flight",
        "one device: the same batch in the same microbatches, without transfers; whether it fits there is not checked",
        f"graph {plan.fingerprint}, plan format {plan.format}",
    ]
    return "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in facts) + "</ul>"
