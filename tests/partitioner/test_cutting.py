"""Cuts within several limits: what answers one question helps with the next, and changes no answer."""

from __future__ import annotations

import random

import networkx as nx
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.errors import InfeasibleError
from stagecut.partitioner import CutDevice, solve

property_test = settings(max_examples=60, deadline=None, derandomize=True)


def random_graph(generator: random.Random) -> nx.DiGraph:
    n = generator.randint(4, 9)
    graph = nx.DiGraph(transfers=[])
    for v in range(n):
        compute_s = generator.randint(1, 9)
        graph.add_node(
            v,
            compute_s={"gpu": float(compute_s)},
            forward_s={"gpu": compute_s / 3},
            memory_bytes=generator.randint(0, 4),
            stash_bytes=generator.randint(0, 6),
        )
        for u in generator.sample(range(v), min(v, generator.randint(1, 2))):
            graph.add_edge(u, v)
    for u in range(n):
        users = list(graph.successors(u))
        if users:
            graph.graph["transfers"].append({"nodes": [u, *users], "seconds": generator.random(), "bytes": 1})
    return graph


@property_test
@given(seed=st.integers(0, 10**6), recompute=st.sampled_from(["never", "choose"]))
def test_a_bound_from_wider_limits_changes_no_optimum(seed: int, recompute: str) -> None:
    generator = random.Random(seed)
    graph, k = random_graph(generator), generator.randint(2, 3)
    at_least_s = 0.0
    limit: float | None = None
    for _ in range(5):
        devices = [CutDevice(f"gpu:{i}", "gpu", limit) for i in range(k)]
        asked = {"ordered": True, "in_flight": range(k, 0, -1), "recompute": recompute, "diagnose": False}
        try:
            plain = solve(graph, devices, **asked)
        except InfeasibleError:
            return
        helped = solve(graph, devices, **asked, at_least_s=at_least_s)
        assert helped.optimal
        assert helped.max_load == helped.lower_bound
        assert abs(helped.max_load - plain.max_load) <= 1e-9 * plain.max_load
        assert plain.max_load >= at_least_s * (1 - 1e-9)
        at_least_s = helped.lower_bound
        limit = max(helped.memory_bytes) * generator.uniform(0.7, 1.0)
