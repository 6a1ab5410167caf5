"""Idle time by cause, and the critical path."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import pipelines

from stagecut.partitioner.scheduling import PipelineCosts, family_schedule, idle_by_cause, search
from stagecut.partitioner.scheduling.critical import critical_path
from stagecut.runtime.schedules.families import FAMILIES

property_test = settings(max_examples=80, deadline=None, derandomize=True)


def uniform(p: int, link_s: float = 0.0, cap: float | None = None) -> PipelineCosts:
    limits = None if cap is None else (cap,) * p
    return PipelineCosts((1.0,) * p, (1.0,) * p, (1.0,) * p, (1.0,) * p, (0.5,) * p, (link_s,) * (p - 1), limits)


@property_test
@given(
    st.sampled_from([name for name, family in FAMILIES.items() if family.placement != "loop"]),
    st.integers(1, 3),
    st.integers(1, 7),
    st.data(),
)
def test_causes_add_up_to_the_bubble_and_the_critical_path_to_the_makespan(
    name: str, p: int, m: int, data: st.DataObject
) -> None:
    family = FAMILIES[name]
    costs = replace(
        data.draw(pipelines(2 * p if family.placement == "vee" else p, p, limited=False)), split_backward=True
    )
    made = family_schedule(name, costs, max(m, family.least(p)), p)
    shares = idle_by_cause(made)
    assert sum(shares.values()) == pytest.approx(made.bubble, abs=1e-9)
    assert all(share >= -1e-12 for share in shares.values())
    path = critical_path(made.problem, made.orders, made.ends_s)
    seconds = sum(costs.seconds(a.kind, a.stage) for a in path)
    pairs = [(a.stage, b.stage) for a, b in pairwise(path)]
    links = sum(made.problem.link_s(min(pair)) for pair in pairs if abs(pair[0] - pair[1]) == 1)
    assert seconds + links == pytest.approx(made.makespan_s)


def test_gpipe_idles_while_it_fills_waits_for_the_first_gradient_and_drains() -> None:
    shares = idle_by_cause(family_schedule("fill-drain", uniform(3), 4))
    total = 3 * 18.0
    # Worker w starts after w forwards and ends w backwards early; between, gradients come from the workers behind it.
    assert shares == pytest.approx(
        {"warm-up": 3 / total, "drain": 6 / total, "communication": 0.0, "memory": 0.0, "imbalance": 9 / total}
    )


def test_what_travels_is_communication() -> None:
    quick, slow = (idle_by_cause(family_schedule("1f1b", uniform(3, link_s), 6)) for link_s in (0.0, 0.25))
    assert quick["communication"] == 0.0
    assert slow["communication"] > 0.01


def test_forwards_that_do_not_fit_are_a_matter_of_memory() -> None:
    tight = idle_by_cause(search(uniform(4, cap=2.0), 8, time_s=0.1))
    ample = idle_by_cause(search(uniform(4, cap=99.0), 8, time_s=0.1))
    assert tight["memory"] > 0.05
    assert ample["memory"] == 0.0
