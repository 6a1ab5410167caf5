"""The costs of stages between downsets, against their definitions on every pair."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.partitioner.cut_input import read_dag
from stagecut.partitioner.downsets import bits, pack
from stagecut.partitioner.slots import CutDevice
from stagecut.partitioner.stage_costs import BurdenSums

DEVICES = [CutDevice("d", "cpu")]
sizes = st.sampled_from([0.0, 1.0, 2.0, 5.0])


@st.composite
def graphs(draw: st.DrawFn) -> nx.DiGraph:
    n = draw(st.integers(2, 6))
    graph = nx.DiGraph()
    for v in range(n):
        graph.add_node(v, compute_s={"cpu": 1.0}, workspace_bytes=draw(sizes))
    graph.add_edges_from(draw(st.lists(st.sampled_from(list(itertools.combinations(range(n), 2))), max_size=8)))
    some = st.lists(st.integers(0, n - 1), min_size=1, max_size=4)
    graph.graph["transfers"] = [
        {"nodes": nodes, "seconds": 0.0, "bytes": draw(sizes)} for nodes in draw(st.lists(some, max_size=5))
    ]
    graph.graph["shared"] = [
        {"nodes": nodes, "memory_bytes": draw(sizes), "stash_bytes": draw(sizes)}
        for nodes in draw(st.lists(some, max_size=4))
    ]
    graph.graph["together"] = draw(st.lists(st.lists(st.integers(0, n - 1), min_size=2, max_size=2), max_size=1))
    return graph


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graphs())
def test_costs_of_every_stage_follow_their_definitions(graph: nx.DiGraph) -> None:
    dag = read_dag(graph, DEVICES, ["cpu"], recompute="choose")
    assert dag.burdens is not None
    full = range(1 << len(dag))
    masks = [mask for mask in full if all(not mask >> v & 1 or mask >> u & 1 for u, v in dag.edges)]
    sums = BurdenSums(dag.burdens, pack(masks, len(dag)))
    for late, outer in enumerate(masks):
        early = [row for row, inner in enumerate(masks) if not inner & ~outer and inner != outer]
        if not early:
            continue
        stages = [{node for v in bits(outer & ~masks[row]) for node in dag.members[v]} for row in early]
        shared, rows = graph.graph["shared"], np.array(early)
        for q, name in enumerate(["memory_bytes", "stash_bytes"]):
            held = [sum(entry[name] for entry in shared if stage & {*entry["nodes"]}) for stage in stages]
            assert sums.shared(late, rows)[q].tolist() == pytest.approx(held)
        nets = [(net["nodes"][0], {*net["nodes"][1:]}, net["bytes"]) for net in graph.graph["transfers"]]
        received = [sum(b for maker, users, b in nets if maker not in stage and stage & users) for stage in stages]
        assert sums.inputs(late, rows).tolist() == pytest.approx(received)
        largest = [max(graph.nodes[v]["workspace_bytes"] for v in stage) for stage in stages]
        assert sums.workspace(late, rows).tolist() == largest
