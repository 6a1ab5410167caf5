"""Nodes that are cheaper than their wires: merging them loses nothing, against brute force."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
import pytest
from brute_cut import Case, check
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from stagecut.partitioner import CutDevice, solve
from stagecut.partitioner.cut_input import read_dag
from stagecut.partitioner.filling import any_order, fixed_order
from stagecut.partitioner.reduction import merge_cheap
from stagecut.partitioner.together import with_skipped_stages

property_test = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
work_s = st.sampled_from([1.0, 2.0, 3.5, 7.0])
small_s = st.sampled_from([0.1, 0.2, 0.5, 1.0])
wires_s = st.sampled_from([0.05, 0.1, 0.3, 0.7, 1.5, 4.0])


@st.composite
def graphs_with_source_chains(draw: st.DrawFn, device_names: Sequence[str]) -> nx.DiGraph:
    """A backbone with short cuts, and chains of small nodes that start from nothing and end in one of its nodes."""
    n, graph = draw(st.integers(1, 4)), nx.DiGraph()
    for v in range(n):
        graph.add_node(v, compute_s={"gpu": draw(work_s), "cpu": draw(work_s)})
        if v:
            graph.add_edge(draw(st.integers(0, v - 1)), v)
    while len(graph) < 7 and draw(st.integers(0, 4)):
        user = draw(st.integers(0, n - 1))
        for _ in range(draw(st.integers(1, min(3, 7 - len(graph))))):
            node = len(graph)
            time_s = draw(small_s)
            graph.add_node(node, compute_s={"gpu": time_s, "cpu": draw(st.sampled_from([time_s, draw(small_s)]))})
            graph.add_edge(node, user)
            user = node
    graph.graph["transfers"] = [{"nodes": [v, *graph.successors(v)], "seconds": draw(wires_s)} for v in graph]
    some = st.sampled_from(list(graph))
    for name in draw(st.lists(st.sampled_from(["memory", "stash", "gradient", "workspace"]), max_size=2)):
        for v in draw(st.lists(some, max_size=3)):
            graph.nodes[v][f"{name}_bytes"] = draw(st.sampled_from([1.0, 3.0]))
    if draw(st.integers(0, 5)) == 0:
        graph.nodes[draw(some)]["pin"] = draw(st.sampled_from(device_names))
        graph.nodes[draw(some)]["kinds"] = [draw(st.sampled_from(["gpu", "cpu"]))]
    if draw(st.integers(0, 5)) == 0:
        graph.graph["all_reduce"] = {"bytes_per_s": 4.0, "latency_s": 0.2, "overlapped": draw(st.booleans()), "per": 1}
    return graph


@st.composite
def cases(draw: st.DrawFn) -> Case:
    k = draw(st.integers(2, 3))
    limit = draw(st.sampled_from([None, None, 8.0]))
    kinds = draw(st.sampled_from([["gpu"], ["gpu"], ["gpu", "cpu"]]))
    pays = draw(st.sampled_from([True, True, True, False]))
    devices = [CutDevice(f"d{i}", draw(st.sampled_from(kinds)), limit, i > 0 or pays) for i in range(k)]
    in_flight = draw(st.sampled_from([None, None, "1f1b"]))
    return Case(
        graph=draw(graphs_with_source_chains([device.name for device in devices])),
        devices=devices,
        ordered=draw(st.booleans()),
        max_replicas=draw(st.sampled_from([1, 1, 2])),
        n_stages=draw(st.sampled_from([None, None, 2])),
        in_flight=in_flight,
        n_microbatches=3 if in_flight == "1f1b" else None,
        recompute=draw(st.sampled_from(["never", "never", "choose", "always"])),
    )


@settings(property_test, max_examples=250)
@given(cases())
def test_graphs_with_source_chains_equal_brute_force(case: Case) -> None:
    cut = check(case)
    if cut is not None:
        dag = read_dag(case.graph, case.devices, sorted({device.kind for device in case.devices}))
        event(f"{len(dag) - len(merge_cheap(dag, memory_limited=False))} nodes merge without limits")


def graph_of(times: dict[str, float], edges: Sequence[tuple[str, str]], wires: dict[str, float]) -> nx.DiGraph:
    graph = nx.DiGraph()
    for node, time_s in times.items():
        graph.add_node(node, compute_s={"cpu": time_s})
    graph.add_edges_from(edges)
    graph.graph["transfers"] = [{"nodes": [v, *graph.successors(v)], "seconds": wires[v]} for v in wires]
    return graph


def cpus(n: int) -> list[CutDevice]:
    return [CutDevice(f"cpu:{i}", "cpu") for i in range(n)]


@pytest.mark.parametrize(("wire_s", "n_left"), [(0.9, 3), (1.0, 2)])
def test_source_joins_its_user_only_if_its_wire_is_no_cheaper(wire_s: float, n_left: int) -> None:
    graph = graph_of({"a": 5.0, "bias": 1.0, "b": 5.0}, [("a", "b"), ("bias", "b")], {"bias": wire_s, "a": 0.5})
    assert len(merge_cheap(read_dag(graph, cpus(2), ["cpu"]), memory_limited=False)) == n_left


def test_a_stage_may_have_nothing_but_a_node_that_would_join_its_user() -> None:
    graph = graph_of({"bias": 1.0, "work": 5.0}, [("bias", "work")], {"bias": 2.0})
    assert solve(graph, cpus(2)).max_load == 6.0
    cut = solve(graph, cpus(2), ordered=True)
    assert (cut.stage_of, cut.max_load, cut.optimal) == ({"bias": 0, "work": 1}, 7.0, True)


def test_a_source_that_is_dear_to_make_and_cheap_to_send_runs_early() -> None:
    graph = graph_of({"a": 2.0, "bias": 1.0, "b": 4.0}, [("a", "b"), ("bias", "b")], {"bias": 0.1, "a": 0.1})
    cut = solve(graph, cpus(2), ordered=True)
    assert (cut.stage_of["bias"], cut.max_load, cut.optimal) == (0, pytest.approx(4.2), True)


def test_skipped_stages_lead_to_every_later_state() -> None:
    ordered = with_skipped_stages(fixed_order(cpus(3), ["cpu"], [1] * 3))
    assert {(step.source, step.target, step.c) for step in ordered.steps} == {
        (0, 1, 0), (0, 2, 1), (0, 3, 2), (1, 2, 1), (1, 3, 2), (2, 3, 2)
    }  # fmt: skip
    assert (ordered.finals, ordered.exact) == ((0, 1, 2, 3), False)
    free = any_order(cpus(3), ["cpu"], [1] * 3)
    assert with_skipped_stages(free).finals == free.finals


def test_many_source_chains_do_not_stand_in_the_way_of_a_proof() -> None:
    graph = nx.DiGraph(transfers=[])
    for v in range(120):
        graph.add_node(v, compute_s={"cpu": 1.0 + v * 37 % 11 / 10})
        graph.add_node(("table", v), compute_s={"cpu": 0.01})
        graph.add_node(("bias", v), compute_s={"cpu": 0.02})
        graph.add_edges_from([(("table", v), ("bias", v)), (("bias", v), v)])
        graph.graph["transfers"] += [
            {"nodes": [("table", v), ("bias", v)], "seconds": 0.01},
            {"nodes": [("bias", v), v], "seconds": 0.03},
        ]
        if v:
            graph.add_edge(v - 1, v)
            graph.graph["transfers"].append({"nodes": [v - 1, v], "seconds": 0.1})
    for ordered in (True, False):
        cut = solve(graph, cpus(8), ordered=ordered)
        assert cut.optimal
        assert cut.n_downsets < 1000
