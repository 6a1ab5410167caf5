"""Several chunks per device on twelve nodes and three devices, against every one of the 531,441 placements."""

from __future__ import annotations

import numpy as np
import pytest
from brute_chunks import digits, falls_into_chunks, loads_of, tied
from chunk_cases import Problem, check_against_brute_force, cost, problems, walks_in_chunks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

property_test = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@settings(property_test, max_examples=12)
@given(problems(n_nodes=12), st.integers(2, 3))
def test_twelve_nodes_on_three_devices_equal_brute_force(problem: Problem, max_chunks: int) -> None:
    check_against_brute_force(problem, max_chunks)


@settings(property_test, max_examples=12)
@given(problems(plain=True, n_nodes=12), st.integers(2, 3))
def test_twelve_nodes_on_three_identical_devices_equal_brute_force(problem: Problem, max_chunks: int) -> None:
    check_against_brute_force(problem, max_chunks)


@settings(property_test, max_examples=40)
@given(problems(), st.integers(1, 3))
def test_brute_force_scores_and_walks_as_each_placement_by_itself(problem: Problem, q: int) -> None:
    graph, devices, in_flight = problem
    groups = tied(graph)
    before = [sum(1 << u for u in groups.predecessors(v)) for v in groups]
    loads = loads_of(graph, devices, in_flight)
    assert len(loads) == len(devices) ** len(groups)
    numbers = np.arange(0, len(loads), 1 + len(loads) // 20)
    for number, place in zip(numbers, digits(numbers, len(groups), len(devices)).tolist(), strict=True):
        chosen = {node: place[g] for g in groups for node in groups.nodes[g]["members"]}
        assert loads[number] == pytest.approx(cost(graph, devices, in_flight, chosen))
        expected = walks_in_chunks(groups, dict(enumerate(place)), q)
        assert falls_into_chunks(before, place, len(devices), q) == expected
