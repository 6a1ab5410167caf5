"""The subcommand ``partition-viz export``: a plan in the formats of other programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StagecutError
from ..partitioner.plan import OpRecord, Plan
from ..records import to_json
from ..runtime.program import Timeline
from .style import STAGE_COLOURS
from .words import clean, count, duration, n_ops, size

if TYPE_CHECKING:
    import networkx as nx


def exported(plan: Plan, path: Path, measured: Timeline | None = None) -> str | bytes:
    """Write ``plan`` in the format that the ending of ``path`` names; only pictures made of pixels are bytes.

    A picture or a trace has the ``measured`` step too.

    Raises:
        StagecutError: no format has that ending, or what it needs is not installed.
    """
    from .png import plan_png
    from .svg import plan_svg

    writers: dict[str, Callable[[Plan], str | bytes]] = {
        ".svg": lambda plan: plan_svg(plan, plan.predicted, measured),
        ".png": lambda plan: plan_png(plan, measured),
        ".dot": plan_dot,
        ".mmd": plan_mermaid,
        ".graphml": plan_graphml,
        ".csv": plan_csv,
        ".json": lambda plan: json.dumps(to_json(plan), indent=1) + "\n",
        ".trace": lambda plan: trace_text(plan, measured),
    }
    kind = ".trace" if path.name == "trace.json" or path.name.endswith(".trace.json") else path.suffix.lower()
    if kind not in writers:
        raise StagecutError(
            f"{path} ends in no format that is known", hint=f"one of {', '.join(writers)} (trace.json for Perfetto)"
        )
    return writers[kind](plan)


def trace_text(plan: Plan, measured: Timeline | None = None) -> str:
    """Write a predicted step, with what each worker holds, for Perfetto; beside it a ``measured`` one."""
    from ..partitioner.residency import memory_over_time
    from ..runtime.program import chrome_trace

    timeline = plan.predicted
    trace = chrome_trace(timeline, memory_over_time(plan, timeline), plan.layout(), measured)
    return json.dumps(trace) + "\n"


def op_graph(plan: Plan) -> nx.DiGraph:
    """Return the ops as a graph with their stages and costs; inputs of the model are left out."""
    import networkx as nx

    graph = nx.DiGraph(model=plan.model, schedule=plan.schedule, fingerprint=plan.fingerprint)
    for op in plan.ops:
        graph.add_node(
            op.name,
            stage=op.stage,
            target=op.target,
            module_path=op.module_path,
            forward_s=op.forward_s,
            backward_s=op.backward_s,
            output_bytes=op.output_bytes,
            saved_bytes=op.saved_bytes,
        )
    graph.add_edges_from((name, op.name) for op in plan.ops for name in op.inputs if name in graph)
    return graph


def plan_graphml(plan: Plan) -> str:
    """Write the op graph as GraphML."""
    import networkx as nx

    graph = op_graph(plan)
    for node in graph:
        for key, value in graph.nodes[node].items():
            graph.nodes[node][key] = clean(value) if isinstance(value, str) else value
    graph.graph.update({key: clean(value) for key, value in graph.graph.items()})
    named = nx.relabel_nodes(graph, clean)
    return "\n".join(nx.generate_graphml(named)) + "\n"


def plan_csv(plan: Plan) -> str:
    """Write a row for each op: where it runs, and what it costs for one microbatch, in seconds and bytes."""
    header = ("op", "stage", "target", "module", "forward_s", "backward_s", "output_bytes", "saved_bytes", "costs")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    for op in plan.ops:
        names = (_inert(op.name), op.stage, _inert(op.target), _inert(op.module_path))
        table.writerow((*names, op.forward_s, op.backward_s, op.output_bytes, op.saved_bytes, op.cost_source))
    return text.getvalue()


def _inert(name: str) -> str:
    """Keep spreadsheets from taking a name for a formula (https://owasp.org/www-community/attacks/CSV_Injection)."""
    name = clean(name)
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name


def plan_dot(plan: Plan) -> str:
    """Write the op graph for Graphviz, a cluster for each stage; edges that cross stages are thick."""
    lines = [f"digraph {_quoted(plan.model)} {{", "  rankdir=LR;", '  node [shape=box, style=filled, fontname="sans"];']
    stage_of = plan.stage_of
    for stage in plan.stages:
        lines += [
            f"  subgraph cluster_{stage.index} {{",
            f"    label={_quoted(f'stage {stage.index}: ' + ', '.join(stage.devices))};",
            *(f"    {_node(op)};" for op in plan.ops if op.stage == stage.index),
            "  }",
        ]
    sizes = {wire.value: wire.n_bytes for wire in plan.wires}
    for op in plan.ops:
        for name in op.inputs:
            if name not in stage_of:
                continue
            crosses = stage_of[name] != op.stage
            label = f" [penwidth=3, label={_quoted(size(sizes.get(name, 0)))}]" if crosses else ""
            lines.append(f"  {_quoted(name)} -> {_quoted(op.name)}{label};")
    return "\n".join([*lines, "}"]) + "\n"


def _node(op: OpRecord) -> str:
    tip = f"{op.target}, {op.module_path}: forward {duration(op.forward_s)}, backward {duration(op.backward_s)}"
    colour = f"{STAGE_COLOURS[op.stage % len(STAGE_COLOURS)]}55"  # thin enough to read the name on
    return f"{_quoted(op.name)} [fillcolor={_quoted(colour)}, tooltip={_quoted(tip)}]"


def _quoted(text: str) -> str:
    """Write a string of the DOT language, in which only quotes and backslashes mean something."""
    escaped = clean(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def plan_mermaid(plan: Plan) -> str:
    """Write the stages and what crosses between them as a Mermaid flowchart."""
    lines = ["flowchart LR"]
    for stage in plan.stages:
        what = f"stage {stage.index}: {', '.join(stage.devices)}"
        n, seconds = count(n_ops(plan, stage.index), "op"), stage.forward_s + stage.backward_s
        costs = f"{n}, {duration(seconds)}, {size(stage.device_bytes)}"
        lines.append(f'  s{stage.index}["{_entities(what)}<br/>{_entities(costs)}"]')
    between: dict[tuple[int, int], int] = {}
    for wire in plan.wires:
        for target in wire.targets:
            between[wire.source, target] = between.get((wire.source, target), 0) + wire.n_bytes
    lines += [f'  s{a} -->|"{size(n)}"| s{b}' for (a, b), n in sorted(between.items())]
    return "\n".join(lines) + "\n"


def _entities(text: str) -> str:
    """Write a Mermaid label: everything but letters, digits and a few signs by its code (``#`` in place of ``&#``)."""
    return "".join(c if c.isalnum() or c in " .,:_-/+" else f"#{ord(c)};" for c in clean(text))
