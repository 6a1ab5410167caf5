"""The layout of the page's graph: laws that hold for every graph and every folding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagecut.tools.report import Shown

checked = settings(max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Drawn:
    """Boxes in bands, and edges that lead forward."""

    bands: list[int]
    edges: list[tuple[int, int]]
    labels: dict[int, float]
    per_line: int


@st.composite
def graphs(draw: st.DrawFn) -> Drawn:
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    bands = [band for band, n in enumerate(sizes) for _ in range(n)]
    pairs = st.tuples(st.integers(0, len(bands) - 1), st.integers(0, len(bands) - 1))
    edges = sorted({(a, b) for a, b in draw(st.lists(pairs, max_size=40)) if a < b})
    labels = {
        i: draw(st.floats(20, 120)) for i, (a, b) in enumerate(edges) if bands[a] != bands[b] and draw(st.booleans())
    }
    return Drawn(bands, edges, labels, draw(st.integers(2, 10)))


@pytest.fixture(scope="module")
def page(browser: Any, plan: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from stagecut.tools.report import report_html

    path = tmp_path_factory.mktemp("layout") / "report.html"
    path.write_text(report_html([Shown("plan", plan)]), encoding="utf-8")
    context = browser.new_context(offline=True)
    opened = context.new_page()
    opened.goto(path.as_uri())
    opened.wait_for_selector("#report header")
    yield opened
    context.close()


LAYOUT = """({bands, edges, labels, per_line}) => window.stagecut.layout(
    bands, edges, new Map(Object.entries(labels).map(([edge, width]) => [Number(edge), width])), per_line)"""


def laid_out(page: Any, drawn: Drawn) -> dict[str, Any]:
    given = {"bands": drawn.bands, "edges": drawn.edges, "labels": drawn.labels, "per_line": drawn.per_line}
    return dict(page.evaluate(LAYOUT, {**given, "labels": {str(k): v for k, v in drawn.labels.items()}}))


def overlap(a: dict[str, float], b: dict[str, float]) -> bool:
    across = a["x"] < b["x"] + b["width"] and b["x"] < a["x"] + a["width"]
    return across and a["y"] < b["y"] + b["height"] and b["y"] < a["y"] + a["height"]


@checked
@given(drawn=graphs())
def test_boxes_lie_apart_and_inside_their_lane(page: Any, drawn: Drawn) -> None:
    found = laid_out(page, drawn)
    boxes, bands = found["boxes"], found["bands"]
    for i, box in enumerate(boxes):
        assert not any(overlap(box, other) for other in boxes[:i])
        lane = bands[drawn.bands[i]]
        assert lane["x"] <= box["x"]
        assert box["x"] + box["width"] <= lane["x"] + lane["width"]
        assert lane["y"] <= box["y"]
        assert box["y"] + box["height"] <= lane["y"] + lane["height"]
    for i, lane in enumerate(bands):
        assert not any(overlap(lane, other) for other in bands[:i])
        assert lane["y"] + lane["height"] <= found["height"]


@checked
@given(drawn=graphs())
def test_edges_read_forward_and_cross_no_box(page: Any, drawn: Drawn) -> None:
    found = laid_out(page, drawn)
    for (source, target), route in zip(drawn.edges, found["routes"]):
        line, column, _ = found["cells"][source]
        to_line, to_column, _ = found["cells"][target]
        assert to_line > line or (to_line == line and to_column > column)
        points = route["points"]
        assert points[0] == [found["boxes"][source]["x"] + found["boxes"][source]["width"], points[0][1]]
        assert points[-1][0] == found["boxes"][target]["x"]
        for (x, y), (x2, y2) in itertools.pairwise(points):
            if len(points) == 2:
                continue  # neighbours: a line through the gap between them
            assert x == x2 or y == y2
            strip = {"x": min(x, x2), "y": min(y, y2), "width": abs(x2 - x), "height": abs(y2 - y)}
            inner = [{**box, "x": box["x"] + 1, "width": box["width"] - 2} for box in found["boxes"]]
            thick = {**strip, "width": strip["width"] + 1e-3, "height": strip["height"] + 1e-3}
            assert not any(overlap(thick, box) for box in inner)


@checked
@given(drawn=graphs())
def test_labels_lie_apart(page: Any, drawn: Drawn) -> None:
    found = laid_out(page, drawn)
    tags = [
        {"x": at[0], "y": at[1] - 7, "width": drawn.labels[edge], "height": 14}
        for edge, at in ((edge, found["routes"][edge]["labelAt"]) for edge in drawn.labels)
        if at and len(found["routes"][edge]["points"]) > 2
    ]
    for i, tag in enumerate(tags):
        assert not any(overlap(tag, other) for other in tags[:i])
        assert tag["x"] + tag["width"] <= found["width"] + 1e-6


@st.composite
def foldable(draw: st.DrawFn) -> dict[str, Any]:
    """Make ops in stages and a tree above them, as the page has them."""
    n = draw(st.integers(1, 40))
    stages = sorted(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    stages = [sorted(set(stages)).index(stage) for stage in stages]
    nodes: list[list[Any]] = [["stage", f"stage {s}", -1, 1] for s in range(max(stages) + 1)]
    own = {s: [s] for s in range(len(nodes))}
    for _ in range(draw(st.integers(0, 8))):
        stage = draw(st.integers(0, max(stages)))
        own[stage].append(len(nodes))
        nodes.append(["module", f"m{len(nodes)}", draw(st.sampled_from(own[stage][:-1])), 1])
    uses = [sorted(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else [-1] for i in range(n)]
    return {
        "names": [f"op{i}" for i in range(n)],
        "stages": stages,
        "uses": uses,
        "seconds": [1.0] * n,
        "nodes": nodes,
        "node_of": [draw(st.sampled_from(own[stage])) for stage in stages],
        "unfolded": sorted(draw(st.sets(st.integers(0, len(nodes) - 1)))),
    }


FOLD = """(graph) => {
    graph.wire_of = new Map();
    const {boxes, boxOf, arrows} = window.stagecut.fold(graph, new Set(graph.unfolded));
    return {boxes: boxes.map(({node, stage, ops}) => ({node, stage, ops})), boxOf,
            arrows: arrows.map(({source, target}) => [source, target])};
}"""


@checked
@given(graph=foldable())
def test_folding_keeps_every_op_in_its_stage_and_arrows_free_of_circles(page: Any, graph: dict[str, Any]) -> None:
    found = page.evaluate(FOLD, graph)
    boxes, box_of = found["boxes"], found["boxOf"]
    assert sorted(op for box in boxes for op in box["ops"]) == list(range(len(graph["names"])))
    for index, box in enumerate(boxes):
        assert all(graph["stages"][op] == box["stage"] and box_of[op] == index for op in box["ops"])
    arrows = {tuple(arrow) for arrow in found["arrows"]}
    wanted = {(box_of[used], box_of[op]) for op, uses in enumerate(graph["uses"]) for used in uses if used >= 0}
    assert {(a, b) for a, b in wanted if a != b} <= arrows
    remaining = set(range(len(boxes)))
    while remaining:
        free = {box for box in remaining if not any(a in remaining and b == box for a, b in arrows)}
        assert free, "arrows form a circle"
        remaining -= free


@checked
@given(graph=foldable())
def test_everything_unfolded_is_a_box_for_each_op(page: Any, graph: dict[str, Any]) -> None:
    everything = {**graph, "unfolded": list(range(len(graph["nodes"])))}
    found = page.evaluate(FOLD, everything)
    assert all(len(box["ops"]) <= 1 for box in found["boxes"])
