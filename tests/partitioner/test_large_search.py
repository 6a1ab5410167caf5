"""The search for large graphs against the one for small graphs, which is tested against brute force."""

from __future__ import annotations

import itertools
import time
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from synthetic_dags import SHAPES, of_size

from stagecut.errors import ConstraintError, InfeasibleError
from stagecut.partitioner import dispatch, large_search
from stagecut.partitioner.cut import Cut, CutDevice, solve
from stagecut.partitioner.cut_options import read_options
from stagecut.partitioner.cut_problem import prepare
from stagecut.partitioner.cut_search import OutOfTime, search
from stagecut.partitioner.downsets import masks_of
from stagecut.partitioner.proving import TOLERANCE, prove
from stagecut.partitioner.reduction import Dag
from stagecut.partitioner.segments import split
from stagecut.partitioner.slots import Slots

KINDS = ("gpu", "cpu")
property_test = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

seconds = st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.5, 0.3, 4.7])
sizes = st.sampled_from([0.0, 0.0, 1.0, 2.0, 5.0])


@st.composite
def layered_dags(draw: st.DrawFn, k: int, plain: bool) -> nx.DiGraph:
    """Hubs with branches between them, a side input for some layers, and transfers across several layers."""
    graph = nx.DiGraph()

    def node(*inputs: int) -> int:
        v = len(graph)
        costs = {"compute_s": {kind: draw(seconds) for kind in KINDS}}
        graph.add_node(v, memory_bytes=draw(sizes), stash_bytes=draw(sizes), **costs)
        graph.add_edges_from((u, v) for u in inputs)
        return v

    x = side = node()
    for _ in range(draw(st.integers(1, 5))):
        ends = []
        for _ in range(draw(st.integers(1, 3))):
            end = x
            for _ in range(draw(st.integers(1, 2))):
                end = node(end, *([side] if draw(st.booleans()) else []))
            ends.append(end)
        side = draw(st.sampled_from([side, ends[0]]))
        x = node(*ends, *([x] if draw(st.booleans()) else []))
    nets = [{"nodes": [v, *graph.successors(v)], "seconds": draw(seconds)} for v in graph]
    some = st.lists(st.sampled_from(list(graph)), min_size=2, max_size=4, unique=True)
    nets += [{"nodes": draw(some), "seconds": draw(seconds)} for _ in range(draw(st.integers(0, 2)))]
    graph.graph["transfers"] = nets
    if not plain:
        for v in draw(st.lists(st.sampled_from(list(graph)), max_size=2)):
            graph.nodes[v]["kinds"] = [draw(st.sampled_from(KINDS))]
        if draw(st.booleans()):
            graph.nodes[draw(st.sampled_from(list(graph)))]["pin"] = f"d{draw(st.integers(0, k - 1))}"
        graph.graph["together"] = draw(st.lists(some, max_size=1))
    return graph


@st.composite
def problems(draw: st.DrawFn, plain: bool) -> tuple[nx.DiGraph, list[CutDevice], dict[str, Any]]:
    k = draw(st.integers(1, 5))
    limits = st.none() if plain else st.sampled_from([None, None, 10.0, 20.0, 30.0])
    devices = [
        CutDevice(f"d{i}", "gpu" if plain else draw(st.sampled_from(KINDS)), draw(limits), draw(st.integers(0, 3)) > 0)
        for i in range(k)
    ]
    how = {"ordered": draw(st.booleans()), "in_flight": [draw(st.integers(1, 3)) for _ in range(k)]}
    return draw(layered_dags(k, plain)), devices, how


def outcome(graph: nx.DiGraph, devices: list[CutDevice], how: dict[str, Any]) -> Cut | str:
    try:
        return solve(graph, devices, **how)
    except (ConstraintError, InfeasibleError) as error:
        return type(error).__name__


def check_equal_to_small_search(problem: tuple[nx.DiGraph, list[CutDevice], dict[str, Any]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "LARGE", 10**9)
        expected = outcome(*problem)
        patch.setattr(dispatch, "LARGE", 0)
        found = outcome(*problem)
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
        return
    event(f"{len(found.order)} stages")
    assert found.optimal
    assert found.max_load == pytest.approx(expected.max_load, rel=1e-8, abs=1e-12)
    assert all(found.stage_of[u] <= found.stage_of[v] for u, v in problem[0].edges)


@property_test
@given(problems(plain=True))
def test_optimum_on_equal_devices_is_that_of_the_small_search(problem: Any) -> None:
    check_equal_to_small_search(problem)


@property_test
@given(problems(plain=False))
def test_optimum_with_kinds_memory_and_pins_is_that_of_the_small_search(problem: Any) -> None:
    check_equal_to_small_search(problem)


@property_test
@given(problems(plain=False))
def test_optimum_is_the_same_if_every_segment_counts_as_wide(problem: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_search, "_MAX_LISTED", 1)
        check_equal_to_small_search(problem)


def gpus(k: int) -> list[CutDevice]:
    return [CutDevice(f"gpu:{i}", "gpu") for i in range(k)]


def read(graph: nx.DiGraph, devices: list[CutDevice], how: dict[str, Any]) -> tuple[Dag, Slots]:
    rest: Any = {"n_stages": None, "max_replicas": 1, "n_microbatches": None, "recompute": "never"}
    problem = prepare(graph, devices, read_options(len(devices), **how, **rest))
    return problem.dag, problem.slots


@property_test
@given(problems(plain=False), st.sampled_from([0.5, 0.9, 1.0 - 1e-6, 1.0 + 1e-6, 1.2, 3.0]), st.booleans())
def test_exact_search_finds_a_cut_below_any_limit_above_the_optimum_and_none_below(
    problem: Any, factor: float, wide: bool
) -> None:
    try:
        dag, slots = read(*problem)
    except (ConstraintError, InfeasibleError):
        return
    best = search(dag, slots, time.monotonic() + 60.0, 200_000).solution
    if best is None or best.max_load_s == 0.0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_search, "_MAX_LISTED", 1 if wide else 5_000)
        state = large_search.LargeSearch(dag, slots, 200_000, lambda: None)
        found = state.exact(factor * best.max_load_s, 10**6)
    assert (found is not None) == (factor > 1)
    if found is not None:
        assert found.max_load_s == pytest.approx(best.max_load_s, rel=1e-9)


@st.composite
def branched_dags(draw: st.DrawFn) -> nx.DiGraph:
    """Layers of up to four branches behind a router, where every operator takes time."""
    graph = nx.DiGraph()

    def node(*inputs: int) -> int:
        graph.add_node(v := len(graph), compute_s={"gpu": draw(st.sampled_from([0.5, 1.0, 2.0, 3.5, 0.3, 4.7]))})
        graph.add_edges_from((u, v) for u in inputs)
        return v

    x = node()
    for _ in range(draw(st.integers(1, 4))):
        norm = node(x)
        router = node(norm) if draw(st.booleans()) else norm
        ends = [node(router, norm) for _ in range(draw(st.integers(1, 4)))]
        if draw(st.booleans()):
            ends[0] = node(ends[0])
        x = node(*ends, *([x] if draw(st.booleans()) else []))
        if draw(st.booleans()):
            x = node(x, ends[0])
    graph.graph["transfers"] = [{"nodes": [v, *graph.successors(v)], "seconds": draw(seconds) / 4} for v in graph]
    return graph


@property_test
@given(branched_dags(), st.integers(2, 5), st.booleans(), st.sampled_from([0.9, 1.0 - 1e-6, 1.0 + 1e-6, 1.1]))
def test_downsets_that_others_stand_in_for_are_not_missed(
    graph: nx.DiGraph, k: int, ordered: bool, factor: float
) -> None:
    dag, slots = read(graph, gpus(k), {"ordered": ordered, "in_flight": [1] * k})
    best = search(dag, slots, time.monotonic() + 60.0, 200_000).solution
    if best is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_search, "_MAX_LISTED", 1)
        found = large_search.LargeSearch(dag, slots, 200_000, lambda: None).exact(factor * best.max_load_s, 10**6)
    assert (found is not None) == (factor > 1)
    if found is not None:
        assert found.max_load_s == pytest.approx(best.max_load_s, rel=1e-9)


def test_few_of_the_downsets_of_eight_experts_are_left() -> None:
    graph = of_size("mixture", 500)
    dag, slots = read(graph, gpus(2), {"ordered": False, "in_flight": [1, 1]})
    state = large_search.LargeSearch(dag, slots, 20_000, lambda: None)
    state.sample(first_only=True)
    prove(state, 1e-4)
    assert state.proven
    assert 0 < state.n_downsets < 20_000  # a layer alone has 390,000


@property_test
@given(problems(plain=True))
def test_hubs_are_the_nodes_comparable_with_all_others(problem: Any) -> None:
    dag, _ = read(*problem)
    order = nx.DiGraph(dag.edges)
    order.add_nodes_from(range(len(dag)))
    segments = split(dag)
    hubs = [v for v in order if len(nx.ancestors(order, v)) + len(nx.descendants(order, v)) == len(dag) - 1]
    assert sorted(hubs) == segments.hub[1:].tolist()


@property_test
@given(problems(plain=True))
def test_hubs_and_inner_downsets_make_up_every_downset_once(problem: Any) -> None:
    dag, _ = read(*problem)
    if len(dag) > 12:
        return
    segments = split(dag)
    found = [
        (1 << base) - 1 | inner << base
        for t, base in enumerate((segments.hub + 1).tolist())
        for inner in masks_of(segments.downsets(t, 10**6))
    ]
    closed = [
        sum(1 << v for v in chosen)
        for size in range(len(dag) + 1)
        for chosen in map(set, itertools.combinations(range(len(dag)), size))
        if all(u in chosen or v not in chosen for u, v in dag.edges)
    ]
    assert sorted(found) == sorted(closed)


@pytest.mark.parametrize("ordered", [False, True])
def test_transformer_of_ten_thousand_nodes_is_cut_to_proven_optimality(ordered: bool) -> None:
    graph = of_size("transformer", 10_000)
    cut = solve(graph, gpus(8), ordered=ordered)
    assert cut.optimal
    assert len(cut.order) == 8
    total_s = sum(costs["gpu"] for _, costs in graph.nodes(data="compute_s"))
    assert total_s / 8 <= cut.max_load <= 1.01 * total_s / 8
    assert all(cut.stage_of[u] <= cut.stage_of[v] for u, v in graph.edges)


@pytest.mark.parametrize("shape", SHAPES)
def test_bound_and_optimum_hold_on_every_shape(shape: str) -> None:
    graph = of_size(shape, 430)
    cut = solve(graph, gpus(3), time_limit_s=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "LARGE", 10**9)
        other = solve(graph, gpus(3), time_limit_s=1.0)
    assert cut.lower_bound <= other.max_load * (1 + TOLERANCE)
    assert other.lower_bound <= cut.max_load * (1 + TOLERANCE)


def test_time_limit_is_kept_and_the_gap_told_where_nothing_orders_the_branches() -> None:
    graph = of_size("two_towers", 4_000)
    start = time.monotonic()
    cut = solve(graph, gpus(8), time_limit_s=1.0)
    assert time.monotonic() - start < 15.0  # with patience for a busy machine
    assert not cut.optimal
    assert 0.9 * cut.max_load < cut.lower_bound < cut.max_load


def test_time_that_is_up_at_once_still_gives_a_cut_and_a_bound() -> None:
    def never() -> None:
        raise OutOfTime

    graph = of_size("transformer", 500)
    dag, slots = read(graph, gpus(4), {"ordered": True, "in_flight": [1] * 4})
    found = large_search.search_large(dag, slots, 1000, never)
    assert found.solution is not None
    assert len(found.solution.stages) == 4
    assert not found.proven
    assert found.lower_bound_s >= float(np.sum(dag.time_s)) / 4 * (1 - 1e-9)
