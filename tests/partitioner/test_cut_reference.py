"""The cut on published cost graphs, whose contiguous optima are proven; several chunks per device do no worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from score_cut import score_cut

from stagecut.partitioner.cut import Cut, solve

FOLDER = Path(__file__).parents[2].parent / "shared/reference/cut"
OPTIMA = {
    "layer_bert24_training": 41.7458,
    "layer_bert24_training_fixed": 46.6082,
    "layer_gnmt_inference": 32.9107,
    "layer_gnmt_inference_fixed": 44.7822,
    "layer_resnet50_training": 78.6318,
    "layer_resnet50_training_fixed": 479.0379,
    "operator_bert_l-3_inference": 27.9186,
    "operator_bert_l-6_training": 72.8650,
}


def read(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    data: dict[str, Any] = json.loads(path.read_text())
    return data


@pytest.mark.parametrize("name", OPTIMA)
def test_published_graph_is_cut_to_its_proven_optimum(name: str) -> None:
    data = read(name)
    graph = nx.node_link_graph(data, edges="edges" if "edges" in data else "links")
    cut = solve(graph, time_limit_s=60.0)
    assert cut.optimal
    assert cut.max_load == pytest.approx(OPTIMA[name], abs=1e-4)
    check(graph, cut, 1)


def check(graph: nx.DiGraph, cut: Cut, max_chunks: int) -> None:
    score = score_cut(graph, graph.graph["devices"], cut.stage_of, cut.order, max_chunks=max_chunks)
    assert score.faults == []
    assert cut.load_of == pytest.approx(score.load_of)
    assert cut.max_load == pytest.approx(score.max_load)


@pytest.mark.parametrize(
    ("name", "best"), [("operator_bert_l-3_inference", 21.9084), ("layer_bert24_training", 39.8447)]
)
def test_two_chunks_per_device_reach_the_best_known_value(name: str, best: float) -> None:
    graph = nx.node_link_graph(read(name), edges="edges")
    cut = solve(graph, max_chunks=2, time_limit_s=20.0)
    check(graph, cut, 2)
    assert cut.max_load <= best + 1e-4
    assert cut.lower_bound <= cut.max_load


def test_two_chunks_per_device_are_never_worse_than_one() -> None:
    graph = nx.node_link_graph(read("layer_resnet50_training_fixed"), edges="edges")
    cut = solve(graph, max_chunks=2, time_limit_s=2.0)
    check(graph, cut, 2)
    assert cut.max_load <= OPTIMA["layer_resnet50_training_fixed"] + 1e-4
