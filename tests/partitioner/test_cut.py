"""The cut against brute force, on small DAGs with everything that a cost graph may carry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import networkx as nx
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from stagecut.errors import ConstraintError, InfeasibleError
from stagecut.partitioner.cut import Cut, CutDevice, solve

KINDS = ("gpu", "cpu")
MOST_ASSIGNMENTS = 2500
property_test = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def pipeline_costs(
    graph: nx.DiGraph, stages: Sequence[set[Any]], devices: Sequence[CutDevice], in_flight: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Loads and bytes of stages in order; infinite where a node cannot run."""
    loads, held = [], []
    for s, (stage, device) in enumerate(zip(stages, devices, strict=True)):
        load = 0.0
        for node in stage:
            costs = graph.nodes[node]["compute_s"]
            load += costs[device.kind] if device.kind in graph.nodes[node].get("kinds", costs) else math.inf
        if device.pays_transfers:
            nets = [({*net["nodes"]}, net["seconds"]) for net in graph.graph.get("transfers", [])]
            load += sum(seconds for nodes, seconds in nets if stage & nodes and nodes - stage)
        loads.append(load)
        stash = sum(graph.nodes[node].get("stash_bytes", 0.0) for node in stage)
        held.append(sum(graph.nodes[node].get("memory_bytes", 0.0) for node in stage) + in_flight[s] * stash)
    return loads, held


def is_allowed(
    graph: nx.DiGraph, stages: Sequence[set[Any]], devices: Sequence[CutDevice], in_flight: Sequence[int]
) -> bool:
    """Whether the stages respect edges, together-groups, pins and memory."""
    stage_of = {node: s for s, stage in enumerate(stages) for node in stage}
    _, held = pipeline_costs(graph, stages, devices, in_flight)
    return (
        all(stage_of[u] <= stage_of[v] for u, v in graph.edges)
        and all(len({stage_of[node] for node in group}) == 1 for group in graph.graph.get("together", []))
        and all(devices[stage_of[v]].name == pin for v, pin in graph.nodes(data="pin") if pin is not None)
        and all(d.memory_bytes is None or m <= d.memory_bytes + 1e-6 for d, m in zip(devices, held, strict=True))
    )


def working_nodes(graph: nx.DiGraph, devices: Sequence[CutDevice]) -> set[Any]:
    """The nodes that can fill a stage: those that take time, or all where groups of these are too few."""
    undirected = nx.Graph()
    undirected.add_nodes_from(graph)
    for group in graph.graph.get("together", []):
        nx.add_path(undirected, group)
    for name in {pin for _, pin in graph.nodes(data="pin") if pin is not None}:
        nx.add_path(undirected, [v for v, pin in graph.nodes(data="pin") if pin == name])
    tied = nx.DiGraph(graph.edges)
    tied.add_nodes_from(graph)
    tied.add_edges_from(arc for u, v in undirected.edges for arc in ((u, v), (v, u)))
    here = {device.kind for device in devices}
    busy = {
        v
        for v, costs in graph.nodes(data="compute_s")
        if any(costs[kind] > 0 for kind in here.intersection(graph.nodes[v].get("kinds", costs)))
    }
    groups = [group for group in nx.strongly_connected_components(tied) if group & busy]
    return busy if len(groups) >= len(devices) else set(graph)


def monotone_stages(graph: nx.DiGraph, k: int) -> Iterator[list[set[Any]]]:
    nodes = list(graph)
    for choice in itertools.product(range(k), repeat=len(nodes)):
        stage_of = dict(zip(nodes, choice, strict=True))
        if all(stage_of[u] <= stage_of[v] for u, v in graph.edges):
            yield [{v for v in nodes if stage_of[v] == s} for s in range(k)]


def brute_force_ordered(graph: nx.DiGraph, devices: Sequence[CutDevice], in_flight: Sequence[int]) -> float:
    working = working_nodes(graph, devices)
    best = math.inf
    for stages in monotone_stages(graph, len(devices)):
        if all(stage & working for stage in stages) and is_allowed(graph, stages, devices, in_flight):
            best = min(best, max(pipeline_costs(graph, stages, devices, in_flight)[0]))
    return best


def brute_force_unordered(graph: nx.DiGraph, devices: Sequence[CutDevice], in_flight: Sequence[int]) -> float:
    best = math.inf
    arrangements = list(itertools.permutations(devices))
    for stages in monotone_stages(graph, len(devices)):
        used = [stage for stage in stages if stage]
        if not all(stages[: len(used)]):
            continue
        for order in {arrangement[: len(used)] for arrangement in arrangements}:
            if is_allowed(graph, used, order, in_flight):
                best = min(best, max(pipeline_costs(graph, used, order, in_flight)[0]))
    return best


def check_against_brute_force(
    graph: nx.DiGraph, devices: Sequence[CutDevice], in_flight: Sequence[int], ordered: bool, **limits: Any
) -> Cut | None:
    force = brute_force_ordered if ordered else brute_force_unordered
    best = force(graph, devices, in_flight)
    if best == math.inf:
        with pytest.raises((InfeasibleError, ConstraintError)):
            solve(graph, devices, ordered=ordered, in_flight=in_flight)
        event("infeasible")
        return None
    try:
        cut = solve(graph, devices, ordered=ordered, in_flight=in_flight, **limits)
    except InfeasibleError as error:
        if limits and "not proven" in str(error):
            return None
        raise
    check_cut(graph, devices, in_flight, ordered, cut)
    assert cut.lower_bound <= best * (1 + 1e-8)
    assert best * (1 - 1e-9) <= cut.max_load
    if not limits:
        assert cut.optimal
        assert cut.max_load == pytest.approx(best, rel=1e-8, abs=1e-12)
    event("feasible")
    return cut


def check_cut(
    graph: nx.DiGraph, devices: Sequence[CutDevice], in_flight: Sequence[int], ordered: bool, cut: Cut
) -> None:
    """Score the cut again, by the functions above alone."""
    by_name = {device.name: device for device in devices}
    order = [by_name[name] for name in cut.order]
    stages = [{v for v in graph if cut.stage_of[v] == s} for s in range(len(order))]
    assert all(stages)
    assert set(cut.stage_of) == set(cut.device_of) == set(graph)
    assert all(cut.device_of[v] == cut.order[cut.stage_of[v]] for v in graph)
    assert is_allowed(graph, stages, order, in_flight)
    loads, held = pipeline_costs(graph, stages, order, in_flight)
    assert cut.loads_s == pytest.approx(loads)
    assert cut.memory_bytes == pytest.approx(held)
    assert cut.max_load == max(cut.loads_s)
    assert cut.lower_bound <= cut.max_load
    assert cut.optimal == (cut.lower_bound == cut.max_load)
    if ordered:
        assert cut.order == tuple(by_name)
        assert all(stage & working_nodes(graph, devices) for stage in stages)


seconds = st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.5, 0.1, 7.0])
sizes = st.sampled_from([0.0, 0.0, 1.0, 2.0, 5.0])


@st.composite
def dags(draw: st.DrawFn, k: int, plain: bool = False) -> nx.DiGraph:
    n = draw(st.integers(1, int(math.log(MOST_ASSIGNMENTS) / math.log(max(k, 2)) + 1e-9)))
    n = min(n, 9)
    names = draw(st.permutations(range(n)))
    graph = nx.DiGraph()
    for v in names:
        graph.add_node(v, compute_s={kind: draw(seconds) for kind in KINDS}, memory_bytes=draw(sizes))
    arcs = [(u, v) for i, u in enumerate(names) for v in names[i + 1 :]]
    graph.add_edges_from(draw(st.lists(st.sampled_from(arcs), max_size=2 * n))) if arcs else None
    nets = [{"nodes": [v, *graph.successors(v)], "seconds": draw(seconds)} for v in names]
    nets += [{"nodes": draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)), "seconds": draw(seconds)}
             for _ in range(draw(st.integers(0, 2)))]  # fmt: skip
    graph.graph["transfers"] = nets
    if not plain:
        for v in draw(st.lists(st.sampled_from(names), max_size=2)):
            graph.nodes[v]["kinds"] = [draw(st.sampled_from(KINDS))]
        for v in draw(st.lists(st.sampled_from(names), max_size=3)):
            graph.nodes[v]["stash_bytes"] = draw(sizes)
        for v in draw(st.lists(st.sampled_from(names), max_size=2)):
            graph.nodes[v]["pin"] = f"d{draw(st.integers(0, k - 1))}"
        graph.graph["together"] = draw(st.lists(st.lists(st.sampled_from(names), min_size=2, max_size=3), max_size=1))
    return graph


@st.composite
def problems(draw: st.DrawFn, plain: bool = False) -> tuple[nx.DiGraph, list[CutDevice], list[int]]:
    k = draw(st.integers(1, 4))
    graph = draw(dags(k, plain))
    limits = st.none() if plain else st.sampled_from([None, None, 3.0, 6.0, 10.0, 20.0])
    same_limit = draw(limits)
    devices = [
        CutDevice(
            f"d{i}",
            "gpu" if plain else draw(st.sampled_from(KINDS)),
            draw(st.sampled_from([same_limit, draw(limits)])),
            draw(st.sampled_from([True, True, False])),
        )
        for i in range(k)
    ]
    return graph, devices, [draw(st.integers(1, 3)) for _ in range(k)]


@property_test
@given(problems(), st.booleans())
def test_cut_equals_brute_force(problem: tuple[nx.DiGraph, list[CutDevice], list[int]], ordered: bool) -> None:
    check_against_brute_force(*problem, ordered)


@property_test
@given(problems(plain=True), st.booleans())
def test_cut_of_identical_devices_equals_brute_force(
    problem: tuple[nx.DiGraph, list[CutDevice], list[int]], ordered: bool
) -> None:
    check_against_brute_force(*problem, ordered)


@property_test
@given(problems(), st.booleans(), st.integers(1, 12))
def test_bound_holds_when_downsets_run_out(
    problem: tuple[nx.DiGraph, list[CutDevice], list[int]], ordered: bool, most: int
) -> None:
    graph, devices, in_flight = problem
    check_against_brute_force(graph, devices, in_flight, ordered, max_downsets=most)
