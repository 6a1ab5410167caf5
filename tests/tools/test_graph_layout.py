import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.tools.graph_layout import GAP, Rect, layout


@st.composite
def graphs(draw):
    """Draw bands without holes, and edges from earlier boxes to later ones of the same or a later band."""
    n = draw(st.integers(1, 30))
    bands = [0, *itertools.accumulate(draw(st.lists(st.integers(0, 1), min_size=n - 1, max_size=n - 1)))]
    pairs = st.sampled_from([(source, target) for target in range(n) for source in range(target)] or [None])
    edges = draw(st.lists(pairs, unique=True, max_size=60)) if n > 1 else []
    labels = {index: 50.0 for index, (source, target) in enumerate(edges) if bands[source] != bands[target]}
    return bands, edges, labels


def segments(route):
    return [
        Rect(min(x, to_x), min(y, to_y), max(abs(to_x - x), 0.01), max(abs(to_y - y), 0.01))
        for (x, y), (to_x, to_y) in zip(route.points, route.points[1:])
    ]


@given(graphs())
def test_no_two_boxes_overlap_and_none_leaves_its_band(graph):
    bands, _, _ = graph
    placed = layout(*graph)
    for index, box in enumerate(placed.boxes):
        assert not any(box.overlaps(other) for other in placed.boxes[:index])
        assert not any(box.overlaps(band) for number, band in enumerate(placed.bands) if number != bands[index])
        assert box.x >= GAP / 2
        assert box.x + box.width <= placed.width
        assert box.y + box.height <= placed.height


@given(graphs())
def test_every_edge_reads_forward(graph):
    _, edges, _ = graph
    cells = layout(*graph).cells
    assert all(cells[source][:2] < cells[target][:2] for source, target in edges)


@given(graphs())
def test_routes_join_their_boxes_and_cross_none(graph):
    _, edges, _ = graph
    placed = layout(*graph)
    for (source, target), route in zip(edges, placed.routes):
        start, end = placed.boxes[source], placed.boxes[target]
        assert route.points[0] == (start.x + start.width, start.y + start.height / 2)
        assert route.points[-1] == (end.x, end.y + end.height / 2)
        assert not any(box.overlaps(segment) for segment in segments(route) for box in placed.boxes)


@given(graphs())
def test_labels_overlap_neither_each_other_nor_a_box(graph):
    _, _, labels = graph
    placed = layout(*graph)
    tags = [Rect(*placed.routes[edge].label_at, labels[edge], 14.0) for edge in labels]
    tags = [Rect(tag.x, tag.y - 7, tag.width, tag.height) for tag in tags]
    for index, tag in enumerate(tags):
        assert not any(tag.overlaps(other) for other in tags[:index])
        assert not any(tag.overlaps(box) for box in placed.boxes)
        assert tag.x + tag.width <= placed.width


@given(graphs())
@settings(max_examples=20)
def test_the_same_graph_is_laid_out_the_same(graph):
    assert layout(*graph) == layout(*graph)


@pytest.mark.parametrize("n", [1, 10, 11, 95])
def test_a_long_chain_is_wrapped_into_lines(n):
    placed = layout([0] * n, [(i, i + 1) for i in range(n - 1)], {})
    assert placed.width < 1300
    assert placed.cells == tuple(sorted(placed.cells))


def test_a_skip_over_lines_goes_round_the_right_end():
    placed = layout([0, 1, 2], [(0, 1), (1, 2), (0, 2)], {})
    last_box = max(box.x + box.width for box in placed.boxes)
    assert max(x for x, _ in placed.routes[2].points) > last_box
    assert max(x for x, _ in placed.routes[0].points) < last_box + GAP


def test_edges_in_a_circle_are_our_own_bug():
    with pytest.raises(AssertionError, match="circle"):
        layout([0, 0], [(0, 1), (1, 0)], {})
