import csv
import io
import json
import shutil
import subprocess
from dataclasses import replace

import networkx as nx
import pytest

from stagecut.partitioner.plan import load
from stagecut.tools.export import plan_csv, plan_dot, plan_graphml, plan_mermaid
from stagecut.tools.partition_viz import main

EVIL = '"];\n evil -> b; a["<img src=x onerror=alert(1)>`</script>'


@pytest.fixture
def evil(plan):
    """The plan of a model whose names mean something in other languages."""
    names = {op.name: f"{EVIL}{index}" for index, op in enumerate(plan.ops)}
    ops = tuple(
        replace(op, name=names[op.name], module_path=EVIL, inputs=tuple(names.get(i, i) for i in op.inputs))
        for op in plan.ops
    )
    wires = tuple(replace(wire, value=names[wire.value]) for wire in plan.wires)
    return replace(plan, model=EVIL, ops=ops, wires=wires)


@pytest.mark.parametrize("name", ["a.svg", "a.dot", "a.mmd", "a.graphml", "a.csv", "a.json", "trace.json"])
def test_every_format_is_written_the_same_every_time(saved, tmp_path, capsys, name):
    contents = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        assert main(["export", saved, "-o", str(tmp_path / folder / name)]) == 0
        contents.append((tmp_path / folder / name).read_bytes())
    assert contents[0] == contents[1] != b""
    assert capsys.readouterr().out == ""


def test_a_format_that_is_not_known_names_those_that_are(saved, tmp_path, capsys):
    assert main(["export", saved, "-o", str(tmp_path / "plan.docx")]) == 2
    assert "one of .svg, .png, .dot, .mmd, .graphml, .csv, .json" in capsys.readouterr().err


def test_json_is_the_plan_and_the_trace_is_a_trace(plan, saved, tmp_path):
    assert main(["export", saved, "-o", str(tmp_path / "again.json")]) == 0
    assert load(tmp_path / "again.json") == plan
    assert main(["export", saved, "-o", str(tmp_path / "my.trace.json")]) == 0
    assert json.loads((tmp_path / "my.trace.json").read_text())["traceEvents"]


def test_graphml_is_the_op_graph(plan):
    graph = nx.parse_graphml(plan_graphml(plan))
    assert {name: data["stage"] for name, data in graph.nodes(data=True)} == plan.stage_of
    assert graph.number_of_edges() == sum(name in plan.stage_of for op in plan.ops for name in set(op.inputs))


def test_csv_has_a_row_for_each_op(plan):
    rows = list(csv.DictReader(io.StringIO(plan_csv(plan))))
    assert [row["op"] for row in rows] == [op.name for op in plan.ops]
    assert [float(row["forward_s"]) for row in rows] == [op.forward_s for op in plan.ops]


def test_dot_has_a_cluster_for_each_stage_and_thick_edges_where_it_is_cut(plan):
    text = plan_dot(plan)
    assert text.count("subgraph cluster_") == len(plan.stages)
    for wire in plan.wires:
        users = [op for op in plan.ops if wire.value in op.inputs and op.stage != wire.source]
        assert all(f'"{wire.value}" -> "{op.name}" [penwidth=3' in text for op in users)
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=text, text=True, capture_output=True, check=True)


def test_mermaid_has_the_stages_and_what_crosses(plan):
    lines = plan_mermaid(plan).splitlines()
    assert lines[0] == "flowchart LR"
    assert sum("[" in line for line in lines) == len(plan.stages)
    assert sum("-->" in line for line in lines) == len({(w.source, t) for w in plan.wires for t in w.targets})


def test_names_of_a_model_stay_names(evil, plan):
    rows = list(csv.reader(io.StringIO(plan_csv(evil))))
    assert len(rows) == len(plan.ops) + 1
    assert len(nx.parse_graphml(plan_graphml(evil))) == len(plan.ops)
    dot = plan_dot(evil)
    assert dot.count("\n") == plan_dot(plan).count("\n"), "no name ends a line"
    outside = [
        part for line in dot.splitlines() for part in line.replace("\\\\", "").replace('\\"', "").split('"')[::2]
    ]
    assert not any("evil" in part for part in outside), "no name leaves its quotes"
    spec = replace(evil, stages=tuple(replace(s, devices=(EVIL,) * len(s.devices)) for s in evil.stages))
    mermaid = plan_mermaid(spec)
    assert mermaid.count("\n") == plan_mermaid(plan).count("\n")
    assert "<img" not in mermaid
    assert "`" not in mermaid
    formula = replace(plan, ops=tuple(replace(op, module_path="=HYPERLINK(1)") for op in plan.ops))
    assert "'=HYPERLINK" in plan_csv(formula)
    assert ",=HYPERLINK" not in plan_csv(formula)
