"""Several chunks per device, against brute force over placements and an independent scorer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from score_cut import score_cut

from stagecut.errors import ConstraintError, InfeasibleError
from stagecut.partitioner import chunk_bounds
from stagecut.partitioner.chunk_costs import ChunkProblem, Placement, Scorer, chunk_problem
from stagecut.partitioner.chunk_exact import arrange, chunkable
from stagecut.partitioner.chunk_search import Schedule, anneal
from stagecut.partitioner.cut import Cut, CutDevice, solve
from stagecut.partitioner.cut_input import read_dag

KINDS = ("gpu", "cpu")
MOST_PLACEMENTS = 2200
property_test = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
Problem = tuple[nx.DiGraph, list[CutDevice], list[int]]


def cost(graph: nx.DiGraph, devices: Sequence[CutDevice], in_flight: Sequence[int], chosen: dict[Any, int]) -> float:
    """The largest load of a placement; infinite where it is not allowed, whatever the chunks."""
    loads, held = [0.0] * len(devices), [0.0] * len(devices)
    for node, d in chosen.items():
        record = graph.nodes[node]
        if devices[d].kind not in record.get("kinds", record["compute_s"]):
            return math.inf
        if record.get("pin") not in (None, devices[d].name):
            return math.inf
        loads[d] += record["compute_s"][devices[d].kind]
        held[d] += record.get("memory_bytes", 0.0) + in_flight[d] * record.get("stash_bytes", 0.0)
    for net in graph.graph.get("transfers", []):
        holders = {chosen[node] for node in net["nodes"]}
        for d in holders:
            loads[d] += net["seconds"] * (len(holders) > 1 and devices[d].pays_transfers)
    fits = all(d.memory_bytes is None or h <= d.memory_bytes + 1e-9 for d, h in zip(devices, held, strict=True))
    return max(loads) if fits else math.inf


def tied(graph: nx.DiGraph) -> nx.DiGraph:
    """The graph of the nodes that must share a chunk: together-groups, and the cycles that these make."""
    arcs = nx.DiGraph(graph.edges)
    arcs.add_nodes_from(graph)
    for group in graph.graph.get("together", []):
        nx.add_cycle(arcs, group)
    return nx.condensation(arcs)


def falls_into_chunks(groups: nx.DiGraph, device_of: dict[int, int], max_chunks: int) -> bool:
    """Walk over (downset, current device, runs used), one group of nodes at a time."""
    n_devices = max(device_of.values()) + 1
    stack: list[tuple[frozenset[int], int, tuple[int, ...]]] = [(frozenset(), -1, (0,) * n_devices)]
    seen = set(stack)
    while stack:
        done, current, runs = stack.pop()
        if len(done) == len(groups):
            return True
        for v in groups:
            if v in done or not done.issuperset(groups.predecessors(v)):
                continue
            d = device_of[v]
            used = tuple(r + (e == d and d != current) for e, r in enumerate(runs))
            state = (done | {v}, d, used)
            if used[d] <= max_chunks and state not in seen:
                seen.add(state)
                stack.append(state)
    return False


def brute_force(graph: nx.DiGraph, devices: Sequence[CutDevice], in_flight: Sequence[int], max_chunks: int) -> float:
    groups = tied(graph)
    placements = []
    for choice in itertools.product(range(len(devices)), repeat=len(groups)):
        chosen = {node: d for v, d in enumerate(choice) for node in groups.nodes[v]["members"]}
        placements.append((cost(graph, devices, in_flight, chosen), choice))
    for load, choice in sorted(placements):
        if load == math.inf:
            break
        if falls_into_chunks(groups, dict(enumerate(choice)), max_chunks):
            return load
    return math.inf


def check(graph: nx.DiGraph, devices: list[CutDevice], in_flight: list[int], max_chunks: int, cut: Cut) -> None:
    records = [asdict(device) for device in devices]
    score = score_cut(graph, records, cut.stage_of, cut.order, max_chunks=max_chunks, in_flight=in_flight)
    assert score.faults == []
    assert cut.load_of == pytest.approx(score.load_of)
    assert cut.max_load == max(cut.load_of.values())
    assert cut.lower_bound <= cut.max_load
    assert cut.optimal == (cut.lower_bound == cut.max_load)
    assert all(cut.device_of[v] == cut.order[s] for v, s in cut.stage_of.items())
    assert all(a != b for a, b in itertools.pairwise(cut.order))
    for name, load in cut.load_of.items():
        at = [s for s, other in enumerate(cut.order) if other == name]
        assert sum(cut.loads_s[s] for s in at) == pytest.approx(load)
        assert sum(cut.memory_bytes[s] for s in at) == pytest.approx(score.bytes_of[name])


seconds = st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.5, 0.1, 7.0])
sizes = st.sampled_from([0.0, 0.0, 1.0, 2.0, 5.0])


@st.composite
def problems(draw: st.DrawFn, plain: bool = False) -> Problem:
    k = draw(st.integers(2, 3))
    n = draw(st.integers(1, int(math.log(MOST_PLACEMENTS) / math.log(k))))
    names = draw(st.permutations(range(n)))
    graph = nx.DiGraph()
    for v in names:
        graph.add_node(v, compute_s={kind: draw(seconds) for kind in KINDS})
    arcs = list(itertools.combinations(names, 2))
    if arcs:
        graph.add_edges_from(draw(st.lists(st.sampled_from(arcs), max_size=2 * n)))
    nets = [{"nodes": [v, *graph.successors(v)], "seconds": draw(seconds)} for v in names]
    nets += [{"nodes": draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)), "seconds": draw(seconds)}
             for _ in range(draw(st.integers(0, 2)))]  # fmt: skip
    graph.graph["transfers"] = nets
    if plain:
        return graph, [CutDevice(f"d{i}", "gpu") for i in range(k)], [1] * k
    decorate(draw, graph, names, k)
    limits = st.sampled_from([None, None, 3.0, 6.0, 10.0, 20.0])
    paying = st.sampled_from([True, True, False])
    devices = [CutDevice(f"d{i}", draw(st.sampled_from(KINDS)), draw(limits), draw(paying)) for i in range(k)]
    return graph, devices, [draw(st.integers(1, 3)) for _ in range(k)]


def decorate(draw: st.DrawFn, graph: nx.DiGraph, names: Sequence[int], k: int) -> None:
    few = st.lists(st.sampled_from(names), max_size=3)
    for v in names:
        graph.nodes[v]["memory_bytes"] = draw(sizes)
    for v in draw(few):
        graph.nodes[v]["kinds"] = [draw(st.sampled_from(KINDS))]
    for v in draw(few):
        graph.nodes[v]["stash_bytes"] = draw(sizes)
    for v in draw(few):
        graph.nodes[v]["pin"] = f"d{draw(st.integers(0, k - 1))}"
    graph.graph["together"] = draw(st.lists(st.lists(st.sampled_from(names), min_size=2, max_size=3), max_size=1))


def check_against_brute_force(problem: Problem, max_chunks: int) -> None:
    graph, devices, in_flight = problem
    best = brute_force(graph, devices, in_flight, max_chunks)
    if best == math.inf:
        with pytest.raises((InfeasibleError, ConstraintError)) as caught:
            solve(graph, devices, in_flight=in_flight, max_chunks=max_chunks)
        assert "not proven" not in str(caught.value)
        event("infeasible")
        return
    cut = solve(graph, devices, in_flight=in_flight, max_chunks=max_chunks)
    check(graph, devices, in_flight, max_chunks, cut)
    assert cut.max_load == pytest.approx(best, rel=1e-8, abs=1e-12)
    assert cut.optimal
    event("chunks" if len(set(cut.order)) < len(cut.order) else "contiguous")


@property_test
@given(problems(), st.integers(2, 3))
def test_chunks_equal_brute_force(problem: Problem, max_chunks: int) -> None:
    check_against_brute_force(problem, max_chunks)


@property_test
@given(problems(plain=True), st.integers(2, 3))
def test_chunks_on_identical_devices_equal_brute_force(problem: Problem, max_chunks: int) -> None:
    check_against_brute_force(problem, max_chunks)


def chain(times: Sequence[float], **attributes: float) -> nx.DiGraph:
    graph = nx.path_graph(len(times), create_using=nx.DiGraph)
    for v, load in enumerate(times):
        graph.nodes[v].update(compute_s={"cpu": load}, **attributes)
    return graph


def cpus(n: int, memory_bytes: float | None = None) -> list[CutDevice]:
    return [CutDevice(f"cpu:{i}", "cpu", memory_bytes) for i in range(n)]


def problem_of(graph: nx.DiGraph, devices: Sequence[CutDevice], max_chunks: int) -> ChunkProblem:
    kinds = sorted({device.kind for device in devices})
    dag = read_dag(graph, devices, kinds, pinned_share_stage=False)
    return chunk_problem(dag, devices, kinds, [1] * len(devices), max_chunks)


def test_two_chunks_balance_what_one_cannot() -> None:
    graph = chain([3.0, 1.0, 2.0])
    assert solve(graph, cpus(2)).max_load == 3.0
    graph = chain([1.0, 4.0, 3.0])
    assert solve(graph, cpus(2)).max_load == 5.0
    cut = solve(graph, cpus(2), max_chunks=2)
    assert (cut.max_load, cut.optimal, len(cut.order)) == (4.0, True, 3)


def test_limit_holds_for_all_chunks_of_a_device_and_its_microbatches() -> None:
    graph = chain([1.0, 4.0, 3.0], stash_bytes=10.0)
    assert solve(graph, cpus(2, 40.0), in_flight=[2, 2], max_chunks=2).max_load == 4.0
    assert solve(graph, cpus(2, 40.0), in_flight=[3, 2], max_chunks=2).device_of[1] == "cpu:0"
    with pytest.raises(InfeasibleError, match="more than its 30"):
        solve(graph, cpus(2, 30.0), in_flight=[2, 2], max_chunks=2)


def test_pins_to_one_device_need_not_share_a_chunk() -> None:
    graph = chain([1.0, 5.0, 1.0])
    graph.nodes[0]["pin"] = graph.nodes[2]["pin"] = "cpu:1"
    assert solve(graph, cpus(2)).max_load == 7.0
    assert solve(graph, cpus(2), max_chunks=2).order == ("cpu:1", "cpu:0", "cpu:1")


def test_nodes_kept_together_share_a_chunk() -> None:
    graph = chain([1.0, 5.0, 1.0])
    graph.graph["together"] = [[0, 2]]
    assert solve(graph, cpus(2), max_chunks=3).order in {("cpu:0",), ("cpu:1",)}


def test_one_chunk_is_the_contiguous_cut() -> None:
    graph = chain([2.0, 3.0, 1.0, 4.0])
    default, explicit = solve(graph, cpus(2)), solve(graph, cpus(2), max_chunks=1)
    assert replace(default, seconds=0.0) == replace(explicit, seconds=0.0)
    assert default.load_of == dict(zip(default.order, default.loads_s, strict=True))


@pytest.mark.parametrize(("max_chunks", "ordered"), [(0, False), (-1, False), (2, True)])
def test_chunk_counts_that_make_no_sense_are_refused(max_chunks: int, ordered: bool) -> None:
    with pytest.raises(ConstraintError, match="max_chunks"):
        solve(chain([1.0]), cpus(1), max_chunks=max_chunks, ordered=ordered)


def test_kinds_that_leave_no_device_are_named() -> None:
    graph = chain([1.0, 1.0], memory_bytes=5.0)
    graph.nodes[0]["kinds"] = []
    with pytest.raises(InfeasibleError, match="no device kind in common"):
        solve(graph, cpus(2), max_chunks=2)


def wide_graph(n: int) -> nx.DiGraph:
    graph = nx.DiGraph()
    for v in range(n):
        graph.add_node(v, compute_s={"cpu": 1.0 + 0.01 * (v * 37 % n)})
    graph.add_edges_from((v, v + 4) for v in range(n - 4))
    graph.graph["transfers"] = [{"nodes": [v, v + 4], "seconds": 0.05 + 0.01 * (v % 5)} for v in range(n - 4)]
    return graph


def test_annealing_is_the_same_for_a_seed_and_never_worse_than_its_start() -> None:
    problem = problem_of(wide_graph(40), cpus(9), 2)  # devices in two bytes of the masks
    start = Placement(np.zeros(40, dtype=np.int64), np.array([0]), 50.0)
    far = math.inf
    one, two = (anneal(problem, start, Schedule(n_steps=400, n_chains=8), far, 0.0, seed=3) for _ in range(2))
    assert one.position.tolist() == two.position.tolist()
    assert one.device.tolist() == two.device.tolist()
    assert one.max_load_s == two.max_load_s < 20.0
    assert Scorer(problem).loads(one.device[one.position][None]).max() == one.max_load_s


def test_cut_of_a_larger_graph_within_its_time_is_valid_with_a_true_bound() -> None:
    graph, devices = wide_graph(60), cpus(5)
    cut = solve(graph, devices, max_chunks=2, time_limit_s=2.0)
    check(graph, devices, [1] * 5, 2, cut)
    assert cut.seconds < 4.0
    assert cut.max_load <= solve(graph, devices, time_limit_s=2.0).max_load * (1 + 1e-9)
    total = sum(record["compute_s"]["cpu"] for record in graph.nodes.values())
    assert total / 5 <= cut.lower_bound * (1 + 1e-9)


@property_test
@given(problems(plain=True), st.sampled_from([3, 20, 10_000]))
def test_bounds_hold_for_every_placement(problem: Problem, most_rows: int) -> None:
    graph, devices, in_flight = problem
    solved = problem_of(graph, devices, 2)
    best = min(
        cost(graph, devices, in_flight, dict(zip(graph, choice, strict=True)))
        for choice in itertools.product(range(len(devices)), repeat=len(graph))
    )
    limit = best * 1.01 + 0.01
    assert chunk_bounds.share_bound_s(solved) <= best * (1 + 1e-9)
    assert chunk_bounds.node_bound_s(solved, limit, lambda: None) <= best * (1 + 1e-9)
    try:
        packed = chunk_bounds.packing_bound_s(solved, limit, most_rows, lambda: None)
    except chunk_bounds.TooManyRows:
        assert most_rows < 10_000
        return
    assert packed <= best * (1 + 1e-9)
    if most_rows == 10_000:
        assert packed == pytest.approx(best, rel=1e-6, abs=1e-9)


@property_test
@given(problems())
def test_bounds_hold_with_pins_kinds_and_limits(problem: Problem) -> None:
    graph, devices, _ = problem
    ones = [1] * len(devices)
    best = brute_force(graph, devices, ones, 2)
    if best == math.inf:
        return
    solved = problem_of(graph, devices, 2)
    limit = best * 1.01 + 0.01
    assert chunk_bounds.share_bound_s(solved) <= best * (1 + 1e-9)
    assert chunk_bounds.node_bound_s(solved, limit, lambda: None) <= best * (1 + 1e-9)
    assert chunk_bounds.packing_bound_s(solved, limit, 10_000, lambda: None) <= best * (1 + 1e-9)


def test_a_dear_net_bounds_the_load_of_a_small_node() -> None:
    graph = chain([1.0, 2.0, 8.0])
    graph.graph["transfers"] = [{"nodes": [0, 1], "seconds": 4.0}]
    bound = chunk_bounds.node_bound_s(problem_of(graph, cpus(3), 2), 100.0, lambda: None)
    assert bound == pytest.approx(8.0)
    graph.nodes[2]["compute_s"]["cpu"] = 1.0
    bound = chunk_bounds.node_bound_s(problem_of(graph, cpus(3), 2), 100.0, lambda: None)
    assert bound == pytest.approx(3.0)


@property_test
@given(problems(plain=True), st.integers(1, 3), st.randoms(use_true_random=False))
def test_chunk_count_of_a_placement_equals_a_walk_over_downsets(problem: Problem, q: int, random: Any) -> None:
    graph, devices, _ = problem
    solved = problem_of(graph, devices, q)
    chosen = np.array([random.randrange(len(devices)) for _ in range(len(solved.dag))])
    member = {members[0]: int(d) for members, d in zip(solved.dag.members, chosen, strict=True)}
    groups = nx.relabel_nodes(graph, {node: i for i, node in enumerate(graph)})
    expected = falls_into_chunks(groups, {i: member[node] for i, node in enumerate(graph)}, q)
    assert chunkable(solved, chosen.astype(np.int8)[None]).tolist() == [expected]
    assert (arrange(solved, chosen) is not None) == expected
