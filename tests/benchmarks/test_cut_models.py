"""The rivals of the cut split graphs as they say, and are scored like the cut itself."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_cut import score_cut
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cut_models import compare, largest_load, summary, table
from rival_splits import (
    by_block_partition,
    by_places,
    by_shares,
    by_torchgpipe,
    layer_places,
    legal_places,
    nearest,
    parameter_counts,
    sequential_layers,
)

import stagecut
from stagecut.partitioner.cut import CutDevice, solve
from stagecut.partitioner.describe import describe
from stagecut.partitioner.pricing import Pricer


def devices(k: int) -> list[CutDevice]:
    return [CutDevice(f"cpu:{s}", "cpu") for s in range(k)]


def chain(times: list[float], together: list[list[int]] | None = None, transfer_s: float = 0.0) -> nx.DiGraph:
    graph = nx.DiGraph(together=together or [])
    for node, seconds in enumerate(times):
        graph.add_node(node, compute_s={"cpu": seconds})
    graph.add_edges_from((node - 1, node) for node in range(1, len(times)))
    graph.graph["transfers"] = [{"nodes": list(edge), "seconds": transfer_s} for edge in graph.edges]
    return graph


@st.composite
def graphs(draw: st.DrawFn) -> nx.DiGraph:
    n = draw(st.integers(4, 9))
    graph = chain(draw(st.lists(st.integers(1, 9).map(float), min_size=n, max_size=n)))
    graph.remove_edges_from(list(graph.edges))
    pairs = list(combinations(range(n), 2))
    graph.add_edges_from(draw(st.lists(st.sampled_from(pairs), unique=True)))
    graph.graph["together"] = [list(pair) for pair in draw(st.lists(st.sampled_from(pairs), max_size=2))]
    costs = st.integers(0, 3).map(float)
    graph.graph["transfers"] = [{"nodes": list(edge), "seconds": draw(costs)} for edge in graph.edges]
    return graph


@given(graphs())
def test_places_are_those_where_two_parts_have_no_fault(graph: nx.DiGraph) -> None:
    records = [{"name": device.name, "kind": device.kind} for device in devices(2)]
    faultless = [
        place
        for place in range(1, len(graph))
        if not score_cut(graph, records, by_places(graph, [place]), ["cpu:0", "cpu:1"]).faults
    ]
    assert legal_places(graph) == faultless


def test_an_edge_that_goes_back_in_the_order_keeps_all_between_its_ends() -> None:
    graph = chain([1.0] * 5)
    graph.add_edge(3, 1)
    assert legal_places(graph) == [1, 4]


@given(graphs(), st.integers(2, 3), st.sampled_from([by_shares, by_block_partition]))
def test_no_rival_beats_the_proven_optimum(graph: nx.DiGraph, k: int, split: Any) -> None:
    if split is by_block_partition:
        pytest.importorskip("torchgpipe")
    weights = {node: record["compute_s"]["cpu"] for node, record in graph.nodes.items()}
    try:
        stage_of = split(graph, weights, k)
    except ValueError:
        assert split is by_block_partition or len(legal_places(graph)) < k - 1
        return
    cut = solve(graph, devices(k), ordered=True)
    assert cut.optimal
    assert largest_load(graph, devices(k), stage_of) >= cut.max_load * (1 - 1e-9)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8).map(sorted), st.integers(0, 20))
def test_nearest_is_nearest_and_of_equals_the_last(values: list[int], target: int) -> None:
    (chosen,) = nearest(values, [target])
    distances = [abs(value - target) for value in values]
    assert distances[chosen] == min(distances)
    assert min(distances) not in distances[chosen + 1 :]


def test_nearest_leaves_room_for_all_targets() -> None:
    assert nearest([1.0, 2.0, 3.0], [9.0, 9.0, 9.0]) == [0, 1, 2]
    assert nearest([1.0, 2.0, 3.0, 4.0], [1.0, 1.0]) == [0, 1]
    with pytest.raises(ValueError, match="3 stages, and only 1 places"):
        nearest([1.0], [0.0, 1.0])


def test_shares_are_equal_where_they_can_be() -> None:
    graph = chain([1.0, 1.0, 2.0, 2.0, 1.0, 1.0])
    weights = {node: record["compute_s"]["cpu"] for node, record in graph.nodes.items()}
    assert list(by_shares(graph, weights, 4).values()) == [0, 0, 1, 2, 3, 3]


def test_a_boundary_moves_to_the_nearest_place_that_tears_nothing() -> None:
    graph = chain([1.0] * 8, together=[[2, 4]])
    assert list(by_shares(graph, dict.fromkeys(graph, 1.0), 2).values()) == [0] * 5 + [1] * 3


def test_block_partition_balances_pieces_that_may_be_parted() -> None:
    pytest.importorskip("torchgpipe")
    graph = chain([1.0, 1.0, 1.0, 1.0, 4.0, 4.0], together=[[0, 1]])
    weights = {node: record["compute_s"]["cpu"] for node, record in graph.nodes.items()}
    assert list(by_block_partition(graph, weights, 2).values()) == [0, 0, 0, 0, 0, 1]


def test_ratios_are_worked_out_by_hand() -> None:
    graph = chain([2.0, 2.0, 4.0], transfer_s=1.0)
    cut = solve(graph, devices(2), ordered=True)
    record = compare(graph, devices(2), cut, {"late": lambda: {0: 0, 1: 1, 2: 1}, "same": lambda: {0: 0, 1: 0, 2: 1}})
    assert record["load_s"] == 5.0
    assert record["ratios"] == pytest.approx({"late": 7 / 5, "same": 1.0})


def test_a_rival_that_tears_a_group_has_a_reason_and_no_ratio() -> None:
    graph = chain([1.0, 1.0, 1.0], together=[[0, 1]])
    cut = solve(graph, devices(2), ordered=True)
    record = compare(graph, devices(2), cut, {"torn": lambda: {0: 0, 1: 1, 2: 1}})
    assert record["ratios"] == {}
    assert "do not share a stage" in record["reasons"]["torn"]


class Net(nn.Module):
    """A sequence of layers with a function between them, as torchvision writes them."""

    def __init__(self, doubled: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(4, 2))
        self.doubled = doubled

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.features(images), 1).flatten(1)
        classes: torch.Tensor = self.classifier(pooled)
        return classes * 2 if self.doubled else classes


IMAGES = torch.ones(2, 3, 8, 8)


def priced(model: nn.Module) -> nx.DiGraph:
    return Pricer(stagecut.capture(model, (IMAGES,)), [IMAGES], describe(["cpu"] * 2), "analytic").at(2).graph


def test_layers_are_opened_and_functions_between_them_found() -> None:
    model = Net()
    layers = sequential_layers(model, IMAGES)
    assert layers is not None
    assert list(layers) == [
        *("features.0", "features.1", "features.2", "classifier.0"),
        *("(AdaptiveAvgPool2d)", "(Flatten)", "classifier.1"),
    ]
    assert all(module.training for module in model.modules())


def test_a_model_that_does_more_than_its_layers_is_no_sequence() -> None:
    assert sequential_layers(Net(doubled=True), IMAGES) is None


def test_layers_are_parted_where_torchgpipe_says_and_no_group_is_torn() -> None:
    graph = priced(Net())
    order, paths = list(graph), list(sequential_layers(Net(), IMAGES) or {})
    assert order.index("features_2") in layer_places(graph, paths, [2, 5])
    torn = layer_places(graph, paths, [1, 6])  # the second layer works in place on what the first one made
    assert [order[place] for place in torn] == ["features_2"]
    late = layer_places(graph, paths, [6, 1])
    assert [order[place] for place in late] == ["classifier_1"]


def test_torchgpipe_balances_layers_that_work_in_place() -> None:
    pytest.importorskip("torchgpipe")
    model = Net()
    graph, layers = priced(model), sequential_layers(model, IMAGES)
    assert layers is not None
    assert set(by_torchgpipe(graph, layers, IMAGES, 2).values()) == {0, 1}
    assert layers["features.1"].inplace is True


def test_parameters_are_counted_once() -> None:
    model = Net()
    model.features[2] = model.features[0] = nn.Conv2d(3, 3, 3)
    model.classifier[1] = nn.Linear(3, 2)
    graph = priced(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = parameter_counts(graph, sizes)
    assert sum(counts.values()) == sum(sizes.values())
    assert counts["features_0"] == 3 * 3 * 9 + 3


def test_table_and_summary_tell_what_failed() -> None:
    graph = chain([2.0, 2.0, 4.0])
    good = compare(graph, devices(2), solve(graph, devices(2), ordered=True), {"time": lambda: {0: 0, 1: 1, 2: 1}})
    records = {
        "b": {"family": "x", "notes": ["64 pixels"], **good},
        "a": {"family": "y", "error": "RuntimeError: no | room", "total_s": 0.1},
    }
    rows = table(records).splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == ["b", "a"]
    assert "1.500" in rows[0]
    assert rows[1].endswith("RuntimeError: no \\| room |")
    assert len({row.replace("\\|", "").count("|") for row in table(records).splitlines()}) == 1
    assert "1 of 2 models cut, 1 proven optimal" in summary(records)
    assert "time: median 1.500, worst 1.500 (b)" in summary(records)
