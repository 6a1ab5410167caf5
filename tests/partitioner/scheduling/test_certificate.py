"""Certificates: CP-SAT agrees with what small cases are known to take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stagecut.partitioner.scheduling import PipelineCosts, family_schedule, search
from stagecut.partitioner.scheduling.certificate import certified

pytest.importorskip("ortools")


def uniform(p: int, cap: float, *, split: bool) -> PipelineCosts:
    return PipelineCosts(
        (1.0,) * p, (1.0,) * p, (1.0,) * p, (1.0,) * p, (0.5,) * p, (0.0,) * (p - 1), (cap,) * p, split_backward=split
    )


@pytest.mark.parametrize("split", [True, False])
def test_a_found_schedule_is_proven_or_bettered(split: bool) -> None:
    found = search(uniform(2, 1.0, split=split), 3, time_s=0.1)
    proven = certified(found, 20.0)
    assert proven.makespan_s <= found.makespan_s
    assert proven.lower_bound_s >= found.lower_bound_s
    assert proven.lower_bound_s == pytest.approx(proven.makespan_s, rel=2e-3)


def test_a_bad_schedule_is_bettered() -> None:
    poor = family_schedule("fill-drain", uniform(3, 9.0, split=True), 4)
    better = certified(replace(poor, lower_bound_s=0.0), 20.0)
    assert better.makespan_s < poor.makespan_s
    assert better.makespan_s == pytest.approx(search(poor.problem.costs, 4, time_s=0.2).makespan_s, rel=2e-3)
