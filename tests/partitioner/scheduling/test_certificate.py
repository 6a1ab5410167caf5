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


def test_whole_backwards_that_spare_an_overhead_are_not_below_the_bound() -> None:
    """A backward in two parts has two overheads, so 1F1B is the best here, though it is not what CP-SAT looks at."""
    costs = replace(uniform(1, 9.0, split=True), op_overhead_s=0.5)
    whole = family_schedule("1f1b", costs, 3)
    halves = family_schedule("zb-h1", costs, 3)
    assert whole.makespan_s < halves.makespan_s
    assert certified(halves, 20.0).lower_bound_s <= whole.makespan_s * (1 + 1e-9)


def test_nothing_to_do_takes_no_time() -> None:
    nothing = PipelineCosts((0.0,), (0.0,), (0.0,), (1.0,), (1.0,), ())
    assert certified(family_schedule("1f1b", nothing, 2), 1.0).makespan_s == 0.0


def test_a_bad_schedule_is_bettered() -> None:
    poor = family_schedule("fill-drain", uniform(3, 9.0, split=True), 4)
    better = certified(replace(poor, lower_bound_s=0.0), 20.0)
    assert better.makespan_s < poor.makespan_s
    assert better.makespan_s == pytest.approx(search(poor.problem.costs, 4, time_s=0.2).makespan_s, rel=2e-3)
