"""Downsets and reductions, each against its definition."""

from __future__ import annotations

import itertools
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.partitioner import cut_input, downsets
from stagecut.partitioner.burdens import Recompute
from stagecut.partitioner.filling import Grouping, OneForwardOneBackward, any_order, fixed_order
from stagecut.partitioner.reduction import Dag, contract, merge_idle
from stagecut.partitioner.slots import CutDevice, Windows, windows

DEVICES = [CutDevice("a", "cpu"), CutDevice("b", "cpu"), CutDevice("c", "cpu")]


def unit_graph(edges: list[tuple[Any, Any]]) -> nx.DiGraph:
    graph = nx.DiGraph(edges)
    for node in graph:
        graph.nodes[node]["compute_s"] = {"cpu": 1.0}
    return graph


def dag_of(graph: nx.DiGraph) -> Dag:
    return cut_input.read_dag(graph, DEVICES, ["cpu"])


@st.composite
def graphs(draw: st.DrawFn) -> nx.DiGraph:
    n = draw(st.integers(1, 8))
    graph = nx.DiGraph()
    for v in range(n):
        graph.add_node(v, compute_s={"cpu": draw(st.sampled_from([0.0, 1.0, 3.0]))})
    arcs = list(itertools.combinations(range(n), 2))
    if arcs:
        graph.add_edges_from(draw(st.lists(st.sampled_from(arcs), max_size=12)))
    nets = [{"nodes": [v, *graph.successors(v)], "seconds": draw(st.sampled_from([0.0, 0.5, 2.0]))} for v in graph]
    graph.graph["transfers"] = nets
    return graph


def every_downset(dag: Dag) -> set[int]:
    full = 1 << len(dag)
    return {mask for mask in range(full) if all(not mask >> v & 1 or mask >> u & 1 for u, v in dag.edges)}


def admitted(dag: Dag, inside: Windows, mask: int) -> bool:
    flags = np.array([[float(mask >> v & 1) for v in range(len(dag))]])
    cut_s = sum(
        seconds
        for net, seconds in zip(dag.nets, dag.net_s, strict=True)
        if 0 < sum(mask >> v & 1 for v in net) < len(net)
    )
    return bool(inside.meet(flags @ inside.weights, (1 - flags) @ inside.weights, np.array([cut_s])).any())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(graphs(), st.floats(0.5, 20.0))
def test_enumeration_lists_exactly_the_downsets_in_the_windows(graph: nx.DiGraph, limit_s: float) -> None:
    dag = dag_of(graph)
    slots = fixed_order(DEVICES, ["cpu"], [1, 1, 1])
    inside = windows(dag, slots, limit_s)
    words = downsets.enumerate_downsets(dag, inside, 10_000, lambda: None)
    found = downsets.masks_of(words)
    assert len(set(found)) == len(found)
    assert set(found) == {mask for mask in every_downset(dag) if admitted(dag, inside, mask)}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(graphs())
def test_orders_pass_through_downsets_and_neighbours_stay_closed(graph: nx.DiGraph) -> None:
    dag = dag_of(graph)
    closed = every_downset(dag)
    for order in downsets.topological_orders(dag):
        assert sorted(order) == list(range(len(dag)))
        assert set(downsets.prefixes(order)) <= closed
    for mask in closed:
        assert downsets.neighbours(dag, mask) <= closed - {mask}


def test_too_many_downsets_are_refused() -> None:
    graph = nx.DiGraph()
    graph.add_nodes_from(range(12), compute_s={"cpu": 1.0})
    dag = dag_of(graph)
    inside = windows(dag, fixed_order(DEVICES, ["cpu"], [1, 1, 1]), 100.0)
    with pytest.raises(downsets.TooManyDownsets):
        downsets.enumerate_downsets(dag, inside, 100, lambda: None)


@given(st.lists(st.integers(0, 2**130 - 1), max_size=5))
def test_masks_survive_packing(masks: list[int]) -> None:
    assert downsets.masks_of(downsets.pack(masks, 130)) == masks


def test_weigh_sums_the_members_of_each_row() -> None:
    values = np.arange(70.0)
    total = downsets.weigh(downsets.pack([0, 1 << 3 | 1 << 69, (1 << 70) - 1], 70), values)
    assert total.tolist() == [0.0, 72.0, values.sum()]


def test_contraction_merges_the_cycles_that_it_makes_and_equal_transfers() -> None:
    graph = unit_graph([(0, 1), (1, 2), (0, 3), (2, 3)])
    graph.graph["transfers"] = [{"nodes": [v, 3], "seconds": 1.0} for v in range(3)]
    dag = contract(dag_of(graph), [(0, 2)])
    assert [set(members) for members in dag.members] == [{0, 1, 2}, {3}]
    assert dag.edges == ((0, 1),)
    assert (dag.nets, dag.net_s.tolist()) == (((0, 1),), [3.0])


def test_edges_are_transitively_reduced() -> None:
    graph = unit_graph([(0, 1), (1, 2), (0, 2)])
    assert dag_of(graph).edges == ((0, 1), (1, 2))


@pytest.mark.parametrize(("output_s", "n_left"), [(0.0, 3), (1.0, 3), (1.5, 4)])
def test_idle_node_joins_its_predecessor_only_if_its_output_is_no_dearer_than_its_input(
    output_s: float, n_left: int
) -> None:
    graph = unit_graph([("work", "idle"), ("idle", "left"), ("idle", "right")])
    graph.nodes["idle"]["compute_s"] = {"cpu": 0.0}
    graph.graph["transfers"] = [
        {"nodes": ["work", "idle"], "seconds": 1.0},
        {"nodes": ["idle", "left", "right"], "seconds": output_s},
    ]
    assert len(merge_idle(dag_of(graph), memory_limited=False)) == n_left


def test_idle_node_with_bytes_stays_apart_under_a_memory_limit() -> None:
    graph = nx.DiGraph([("parameter", "work")])
    graph.add_node("parameter", compute_s={"cpu": 0.0}, memory_bytes=8.0)
    graph.add_node("work", compute_s={"cpu": 1.0})
    assert len(merge_idle(dag_of(graph), memory_limited=True)) == 2
    assert len(merge_idle(dag_of(graph), memory_limited=False)) == 1


def test_dear_transfer_does_not_tie_nodes_whose_replicas_share_it() -> None:
    graph = unit_graph([(0, 1)])
    graph.graph["transfers"] = [{"nodes": [0, 1], "seconds": 4.0}]
    dag = dag_of(graph)
    for most, tied in [(1, [(0, 1)]), (2, [])]:
        slots = any_order(DEVICES * 2, ["cpu"], [1] * 6, Grouping(max_replicas=most))
        assert downsets.inseparable(dag, windows(dag, slots, 3.0), 0) == tied


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize(("narrow_bytes", "n_left"), [(4.0, 3), (3.0, 4)])
def test_idle_node_joins_its_neighbour_only_if_no_stage_receives_more_bytes(
    forks: bool, narrow_bytes: float, n_left: int
) -> None:
    if forks:
        wires = [("a", ["idle"], narrow_bytes), ("idle", ["b", "c"], 4.0)]
    else:
        wires = [("a", ["idle"], 2.0), ("b", ["idle"], 2.0), ("idle", ["c"], narrow_bytes)]
    graph = unit_graph([(u, v) for u, users, _ in wires for v in users])
    graph.nodes["idle"]["compute_s"] = {"cpu": 0.0}
    graph.graph["transfers"] = [{"nodes": [u, *users], "seconds": 0.0, "bytes": size} for u, users, size in wires]
    dag = cut_input.read_dag(graph, DEVICES, ["cpu"], recompute="choose")
    assert len(merge_idle(dag, memory_limited=True)) == n_left
    assert len(merge_idle(dag_of(graph), memory_limited=True)) == 3


@pytest.mark.parametrize("recompute", ["choose", "always"])
@pytest.mark.parametrize("burden", ["workspace_bytes", "forward_s", "shared"])
def test_idle_node_with_a_burden_of_its_own_stays_apart(recompute: Recompute, burden: str) -> None:
    graph = unit_graph([("work", "idle")])
    graph.nodes["idle"].update(compute_s={"cpu": 0.0}, **{burden: {"cpu": 1.0} if burden == "forward_s" else 1.0})
    graph.graph["shared"] = [{"nodes": ["idle"], "stash_bytes": float(burden == "shared")}]
    dag = cut_input.read_dag(graph, DEVICES, ["cpu"], recompute=recompute)
    assert len(merge_idle(dag, memory_limited=True)) == 2


def test_states_of_equal_devices_are_as_many_as_devices_used() -> None:
    devices = [CutDevice(f"d{i}", "cpu") for i in range(64)]
    for in_flight in ([1] * 64, OneForwardOneBackward(8)):
        slots = any_order(devices, ["cpu"], in_flight, Grouping(max_replicas=8))
        assert len(slots.used) == 65
        assert len(slots.steps) == sum(min(8, 64 - used) for used in range(64))
