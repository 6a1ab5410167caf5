"""Random graphs for cuts with several chunks per device, and what such a cut is checked against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import networkx as nx
import pytest
from brute_chunks import brute_force
from hypothesis import event
from hypothesis import strategies as st
from score_cut import score_cut

from stagecut.errors import ConstraintError, InfeasibleError
from stagecut.partitioner import Cut, CutDevice, solve

KINDS = ("gpu", "cpu")
MOST_PLACEMENTS = 2200
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


def walks_in_chunks(groups: nx.DiGraph, device_of: dict[int, int], max_chunks: int) -> bool:
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
def problems(draw: st.DrawFn, plain: bool = False, n_nodes: int | None = None) -> Problem:
    k = draw(st.integers(2, 3)) if n_nodes is None else 3
    n = n_nodes or draw(st.integers(1, int(math.log(MOST_PLACEMENTS) / math.log(k))))
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
