"""Several chunks per device, against brute force over placements and an independent scorer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from brute_chunks import brute_force
from chunk_cases import Problem, check, check_against_brute_force, cost, problems, walks_in_chunks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagecut.errors import ConstraintError, InfeasibleError
from stagecut.partitioner import chunk_bounds
from stagecut.partitioner.chunk_costs import ChunkProblem, Placement, Scorer, chunk_problem
from stagecut.partitioner.chunk_exact import arrange, chunkable
from stagecut.partitioner.chunk_search import Schedule, anneal
from stagecut.partitioner.cut import CutDevice, solve
from stagecut.partitioner.cut_input import read_dag

property_test = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


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
    # A part of its time goes to cuts into one chunk each, so it has more than the search that it is held against.
    cut = solve(graph, devices, max_chunks=2, time_limit_s=6.0)
    check(graph, devices, [1] * 5, 2, cut)
    assert cut.seconds < 12.0
    assert cut.max_load <= solve(graph, devices, time_limit_s=1.0).max_load * (1 + 1e-9)
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
    expected = walks_in_chunks(groups, {i: member[node] for i, node in enumerate(graph)}, q)
    assert chunkable(solved, chosen.astype(np.int8)[None]).tolist() == [expected]
    assert (arrange(solved, chosen) is not None) == expected
