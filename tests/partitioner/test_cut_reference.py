"""The cut on published cost graphs, whose contiguous optima are proven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

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


def loads_of(data: dict[str, Any], cut: Cut) -> dict[str, float]:
    """Score the devices from the file's own records."""
    devices = {device["name"]: device for device in data["graph"]["devices"]}
    loads = dict.fromkeys(devices, 0.0)
    for node in data["nodes"]:
        device = devices[cut.device_of[node["id"]]]
        assert device["kind"] in node["kinds"]
        loads[device["name"]] += node["compute_s"][device["kind"]]
    for transfer in data["graph"]["transfers"]:
        holders = {cut.device_of[node] for node in transfer["nodes"]}
        for name in holders if len(holders) > 1 else ():
            loads[name] += transfer["seconds"] * devices[name]["pays_transfers"]
    return loads


@pytest.mark.parametrize("name", OPTIMA)
def test_published_graph_is_cut_to_its_proven_optimum(name: str) -> None:
    data = read(name)
    graph = nx.node_link_graph(data, edges="edges" if "edges" in data else "links")
    cut = solve(graph, time_limit_s=60.0)
    assert cut.optimal
    assert cut.max_load == pytest.approx(OPTIMA[name], abs=1e-4)
    loads = loads_of(data, cut)
    assert max(loads.values()) == pytest.approx(cut.max_load)
    assert all(cut.stage_of[u] <= cut.stage_of[v] for u, v in graph.edges)
    for device in data["graph"]["devices"]:
        held = sum(node["memory_bytes"] for node in data["nodes"] if cut.device_of[node["id"]] == device["name"])
        assert device["memory_bytes"] is None or held <= device["memory_bytes"]
