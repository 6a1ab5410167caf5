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
MOST_ASSIGNMENTS = 2200
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
    pinned = {pin for _, pin in graph.nodes(data="pin") if pin is not None}
    sorts = {
        tuple((d.kind, d.memory_bytes, d.pays_transfers, d.name if d.name in pinned else "") for d in order): order
        for order in itertools.permutations(devices)
    }
    arrangements = list(sorts.values())
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


def chain(times: Sequence[float], memory_bytes: float = 0.0) -> nx.DiGraph:
    graph = nx.path_graph(len(times), create_using=nx.DiGraph)
    for v, seconds in enumerate(times):
        graph.nodes[v].update(compute_s={"cpu": seconds}, memory_bytes=memory_bytes)
    return graph


def cpus(n: int, memory_bytes: float | None = None) -> list[CutDevice]:
    return [CutDevice(f"cpu:{i}", "cpu", memory_bytes) for i in range(n)]


def test_devices_are_read_from_the_graph() -> None:
    graph = chain([1.0, 2.0])
    graph.graph["devices"] = [{"name": "x", "kind": "cpu", "memory_bytes": None, "pays_transfers": True}]
    assert solve(graph).order == ("x",)


def test_unordered_devices_may_stay_unused_where_transfers_are_dear() -> None:
    graph = chain([1.0, 1.0])
    graph.graph["transfers"] = [{"nodes": [0, 1], "seconds": 5.0}]
    assert solve(graph, cpus(2)).order == ("cpu:0",)
    assert solve(graph, cpus(2), ordered=True).loads_s == (6.0, 6.0)


def test_ordered_stage_holds_work_even_if_idle_nodes_could_fill_it() -> None:
    graph = chain([0.0, 4.0, 1.0, 0.0])
    cut = solve(graph, cpus(2), ordered=True)
    assert cut.stage_of == {0: 0, 1: 0, 2: 1, 3: 1}


def test_nodes_without_time_fill_stages_where_too_few_take_time() -> None:
    cut = solve(chain([0.0, 1.0, 0.0]), cpus(3), ordered=True)
    assert cut.stage_of == {0: 0, 1: 1, 2: 2}


def test_in_flight_microbatches_count_against_the_limit() -> None:
    graph = chain([1.0, 1.0, 1.0, 1.0])
    nx.set_node_attributes(graph, 10.0, "stash_bytes")
    cut = solve(graph, cpus(2, 30.0), ordered=True, in_flight=[3, 1])
    assert cut.memory_bytes == (30.0, 30.0)
    assert cut.loads_s == (1.0, 3.0)


def test_same_input_gives_the_same_cut() -> None:
    graph = nx.gnp_random_graph(30, 0.1, seed=3, directed=True)
    graph = nx.DiGraph((u, v) for u, v in graph.edges if u < v)
    for v in graph:
        graph.nodes[v]["compute_s"] = {"cpu": 1.0}
    first, second = (solve(graph, cpus(4)) for _ in range(2))
    assert first.optimal
    assert (first.stage_of, first.order) == (second.stage_of, second.order)


def test_when_time_is_up_the_bound_is_proven_and_the_cut_is_not_called_optimal() -> None:
    graph = nx.DiGraph()
    for v in range(60):
        graph.add_node(v, compute_s={"cpu": 1.0 + 0.01 * (v * 37 % 60)})
    graph.add_edges_from((v, v + 6) for v in range(54))
    graph.graph["transfers"] = [{"nodes": [v, v + 6], "seconds": 0.37 + 0.01 * (v % 7)} for v in range(54)]
    cut = solve(graph, cpus(7), time_limit_s=0.5, max_downsets=300)
    check_cut(graph, cpus(7), [1] * 7, False, cut)
    assert sum(costs["cpu"] for _, costs in graph.nodes(data="compute_s")) / 7 <= cut.lower_bound * (1 + 1e-9)
    assert not cut.optimal
    assert cut.lower_bound < cut.max_load


def test_memory_error_names_the_device_the_bytes_and_what_would_fit() -> None:
    with pytest.raises(InfeasibleError) as caught:
        solve(chain([1.0] * 4, memory_bytes=10.0), cpus(2, 15.0))
    text = str(caught.value)
    assert "20 bytes on 'cpu:0', 5 more than its 15" in text
    assert "raise every limit by 5 bytes" in text
    assert "use 4 devices" in text


def test_memory_error_says_when_one_node_is_too_large_for_any_device() -> None:
    graph = chain([1.0, 1.0], memory_bytes=1.0)
    graph.nodes[1]["memory_bytes"] = 40.0
    with pytest.raises(InfeasibleError, match=r"\[1\] alone need 40"):
        solve(graph, cpus(2, 15.0))


def test_too_many_stages_are_refused_with_the_most_there_can_be() -> None:
    graph = chain([1.0, 1.0, 1.0])
    graph.graph["together"] = [[0, 1]]
    with pytest.raises(InfeasibleError, match="at most 2 stages"):
        solve(graph, cpus(3), ordered=True)


def test_pins_against_the_order_of_the_devices_are_refused() -> None:
    graph = chain([1.0, 1.0])
    graph.nodes[0]["pin"], graph.nodes[1]["pin"] = "cpu:1", "cpu:0"
    assert solve(graph, cpus(2)).order == ("cpu:1", "cpu:0")
    with pytest.raises(ConstraintError, match="pinned"):
        solve(graph, cpus(2), ordered=True)


BAD_GRAPHS: dict[str, dict[str, Any]] = {
    "unknown device": {"nodes": {0: {"pin": "nowhere"}}},
    "kind of the pinned device": {"nodes": {0: {"pin": "cpu:0", "kinds": ["gpu"], "compute_s": {"gpu": 1.0}}}},
    "unknown node in together": {"graph": {"together": [[0, 9]]}},
    "unknown node in a transfer": {"graph": {"transfers": [{"nodes": [0, 9], "seconds": 1.0}]}},
    "two pins in one stage": {"nodes": {0: {"pin": "cpu:0"}, 2: {"pin": "cpu:1"}}, "graph": {"together": [[0, 2]]}},
    "pins around a pinned node": {"nodes": {0: {"pin": "cpu:0"}, 1: {"pin": "cpu:1"}, 2: {"pin": "cpu:0"}}},
    "negative time": {"nodes": {0: {"compute_s": {"cpu": -1.0}}}},
    "no time for a kind": {"nodes": {0: {"kinds": ["tpu"]}}},
    "no times": {"nodes": {0: {"compute_s": None}}},
}


@pytest.mark.parametrize("what", BAD_GRAPHS)
def test_contradictions_are_named(what: str) -> None:
    graph = chain([1.0, 1.0, 1.0])
    for node, attributes in BAD_GRAPHS[what].get("nodes", {}).items():
        graph.nodes[node].update(attributes)
    graph.graph.update(BAD_GRAPHS[what].get("graph", {}))
    devices = [*cpus(2), CutDevice("gpu:0", "gpu")]
    with pytest.raises(ConstraintError):
        solve(graph, devices)


@pytest.mark.parametrize(("devices", "in_flight"), [([], None), (cpus(1) * 2, None), (cpus(2), [1]), (cpus(1), [-1])])
def test_bad_devices_are_refused(devices: list[CutDevice], in_flight: list[int] | None) -> None:
    with pytest.raises(ConstraintError):
        solve(chain([1.0]), devices, in_flight=in_flight)
