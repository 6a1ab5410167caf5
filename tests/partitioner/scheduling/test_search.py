"""The search: never worse than what was published, equal to the optimum of small cases, never below its bound."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import pipelines

from stagecut.errors import ConstraintError, InfeasibleError, PlanError
from stagecut.partitioner.scheduling import PipelineCosts, family_schedule, score, search
from stagecut.partitioner.scheduling.bounds import lower_bound_s
from stagecut.partitioner.scheduling.clock import Problem, run
from stagecut.partitioner.scheduling.listing import listed, rules
from stagecut.partitioner.scheduling.local_search import HEATS, improved
from stagecut.runtime.instructions import Action, Layout
from stagecut.runtime.schedules.families import FAMILIES
from stagecut.runtime.schedules.placement import chain, loop, vee

property_test = settings(max_examples=60, deadline=None, derandomize=True)


Chains = tuple[tuple[Action, ...], ...]


def interleavings(chains: Chains, sooner: Callable[[Action], Action | None]) -> Iterator[tuple[Action, ...]]:
    """List every order of some chains of actions in which none comes before the one that ``sooner`` names."""
    if not any(chains):
        yield ()
    left = {action for own in chains for action in own}
    for index, own in enumerate(chains):
        if own and sooner(own[0]) not in left:
            rest = (*chains[:index], own[1:], *chains[index + 1 :])
            yield from ((own[0], *tail) for tail in interleavings(rest, sooner))


def needed(action: Action) -> Action | None:
    """Return what comes before in another stage: the forward of the one before, the backward of the one after."""
    if action.kind == "W":
        return None
    return replace(action, stage=action.stage + (-1 if action.kind == "F" else 1))


def chains_of(problem: Problem, worker: int) -> Chains:
    """List what a worker has to compute: of each of its stages and microbatches, one after the other."""
    kinds, stages = problem.costs.kinds(), problem.stages_of(worker)
    return tuple(tuple(Action(k, s, m) for k in kinds) for s in stages for m in range(problem.n_microbatches))


def best_of_all(problem: Problem) -> float:
    """Try every order of every worker that does not wait for itself; infinity if none fits."""
    choices = [list(interleavings(chains_of(problem, w), needed)) for w in range(problem.n_workers)]
    best = float("inf")
    for orders in itertools.product(*choices):
        try:
            best = min(best, score("one of all", problem, orders).makespan_s)
        except PlanError:  # a deadlock, or too much memory
            continue
    return best


@pytest.mark.parametrize("layout", [loop(1, 2), vee(1)])
@pytest.mark.parametrize("split", [True, False])
def test_an_order_that_is_left_out_waits_for_itself(layout: Layout, split: bool) -> None:
    costs = PipelineCosts((1.0,) * 2, (1.0,) * 2, (1.0,) * 2, (1.0,) * 2, (0.5,) * 2, (0.0,), split_backward=split)
    problem = Problem(costs, layout, 1)
    chains = chains_of(problem, 0)
    tried = set(interleavings(chains, needed))
    every = set(interleavings(chains, lambda action: None))
    assert tried < every
    assert len(every) == (20 if split else 6)
    for order in every - tried:
        with pytest.raises(PlanError, match="in a circle"):
            score("left out", problem, (order,))
    for order in tried:
        score("tried", problem, (order,))


@settings(property_test, max_examples=10)
@given(st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 1)]), st.data())
def test_small_cases_are_solved_and_bounds_hold(size: tuple[int, int], data: st.DataObject) -> None:
    p, m = size
    costs = data.draw(pipelines(p, p))
    problem = Problem(costs, chain(p), m)
    best = best_of_all(problem)
    assert lower_bound_s(problem) <= best * (1 + 1e-9)
    assert search(costs, m, p, time_s=0.2).makespan_s == pytest.approx(best)


@settings(property_test, max_examples=8)
@given(st.sampled_from([loop(1, 2), vee(1), loop(2, 2), vee(2)]), st.data())
def test_bounds_hold_with_several_stages_per_worker(layout: object, data: st.DataObject) -> None:
    problem_layout: chain = layout  # type: ignore[valid-type]
    p = problem_layout.n_workers
    problem = Problem(data.draw(pipelines(2 * p, p)), problem_layout, 1 if p == 2 else 2)
    assert lower_bound_s(problem) <= best_of_all(problem) * (1 + 1e-9)


@property_test
@given(st.integers(1, 4), st.sampled_from([1, 2]), st.integers(1, 8), st.data())
def test_no_schedule_is_below_the_bound_and_the_search_is_above_none(
    p: int, chunks: int, m: int, data: st.DataObject
) -> None:
    costs = data.draw(pipelines(p * chunks, p))
    found = search(costs, m, p, time_s=0.02)
    assert found.makespan_s >= found.lower_bound_s * (1 - 1e-9)
    assert costs.memory_bytes is None or all(
        held <= limit * (1 + 1e-9) for held, limit in zip(found.peak_bytes, costs.memory_bytes)
    )
    score("again", found.problem, found.orders)
    for name, family in FAMILIES.items():
        try:
            other = family_schedule(name, costs, m, p)
        except PlanError:
            continue
        if family.trains:
            assert other.makespan_s >= other.lower_bound_s * (1 - 1e-9), name
            assert found.makespan_s <= other.makespan_s * (1 + 1e-9), name


def uniform(p: int, cap: float | None = None) -> PipelineCosts:
    limits = None if cap is None else (cap,) * p
    return PipelineCosts((1.0,) * p, (1.0,) * p, (0.7,) * p, (1.0,) * p, (0.5,) * p, (0.05,) * (p - 1), limits)


def test_the_same_seed_gives_the_same_schedule() -> None:
    costs = replace(uniform(4, 3.0), forward_s=(1.0, 1.3, 0.8, 1.1))
    one, again = (search(costs, 8, time_s=0.2, seed=3) for _ in range(2))
    assert one.orders == again.orders


def test_with_half_more_memory_than_1f1b_the_bound_is_reached() -> None:
    """The 6.2B model of the zero-bubble paper, 8 stages, 24 microbatches."""
    costs = PipelineCosts(
        (29.718,) * 8, (29.444,) * 8, (19.927,) * 8, (1.0,) * 8, (0.5,) * 8, (0.527,) * 7, (12.0,) * 8
    )
    found = search(costs, 24, time_s=2.0)
    assert found.bubble <= 0.1005
    assert found.makespan_s == pytest.approx(found.lower_bound_s)


@pytest.mark.parametrize("cap", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("split", [True, False])
def test_less_memory_than_any_published_schedule_needs_is_enough(cap: float, split: bool) -> None:
    found = search(replace(uniform(4, cap), split_backward=split), 8, time_s=0.5)
    assert max(found.peak_bytes) <= cap
    with pytest.raises(InfeasibleError):
        family_schedule("1f1b", found.problem.costs, 8)


def test_loops_and_vs_are_tried_where_there_are_stages_enough() -> None:
    halves = PipelineCosts((0.5,) * 8, (0.5,) * 8, (0.5,) * 8, (0.5,) * 8, (0.25,) * 8, (0.0,) * 7, (4.0,) * 4)
    found = search(halves, 12, time_s=0.5)
    assert found.problem.layout.workers == vee(4).workers
    assert found.makespan_s <= 36 + 1.5 + 1e-9


def test_local_search_keeps_what_it_is_given_or_betters_it() -> None:
    problem = Problem(replace(uniform(3), backward_weight_s=(0.1, 2.0, 0.4)), chain(3), 6)
    orders = FAMILIES["zb-h1"].make(problem.layout, 6)
    before = score("zb-h1", problem, orders).makespan_s
    after = score("improved", problem, improved(problem, orders, 100_000, 0)).makespan_s
    assert after < before
    assert improved(problem, orders, 0, 0) == orders


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.trains])
@pytest.mark.parametrize("heat", HEATS)
def test_local_search_sets_out_from_any_schedule(name: str, heat: float) -> None:
    """DualPipeV has whole backwards that wait for halves, and halves that wait for whole ones."""
    layout = {"chain": chain(4), "loop": loop(2, 2), "vee": vee(2)}[FAMILIES[name].placement]
    problem = Problem(replace(uniform(4), forward_s=(1.0, 0.4, 1.7, 0.8)), layout, 6)
    orders = FAMILIES[name].make(layout, 6)
    before = score(name, problem, orders)
    after = score("improved", problem, improved(problem, orders, 50_000, 1, heat, before.lower_bound_s))
    assert before.lower_bound_s * (1 - 1e-9) <= after.makespan_s <= before.makespan_s


def test_list_scheduling_keeps_the_limits_of_its_rules() -> None:
    problem = Problem(uniform(4), chain(4), 8)
    for rule in rules(problem):
        made = listed(problem, rule)
        assert made is not None
        for s, order in enumerate(made):
            held = list(itertools.accumulate({"F": 1, "I": -1}.get(a.kind, 0) for a in order))
            assert max(held) <= rule.in_flight[s]


def test_a_microbatch_that_does_not_fit_is_refused_by_how_much() -> None:
    with pytest.raises(InfeasibleError, match=r"needs 1 bytes on worker 0, 0 more|needs 1 bytes on worker") as caught:
        search(uniform(2, 0.5), 4)
    assert caught.value.hint is not None
    assert "memory_bytes" in caught.value.hint
    with pytest.raises(ConstraintError, match="cannot be spread evenly"):
        search(uniform(4), 4, 3)
    with pytest.raises(ConstraintError, match="at least one microbatch, got 0"):
        search(uniform(4), 0)


def test_the_search_says_what_it_does() -> None:
    heard: list[str] = []
    search(replace(uniform(4), forward_s=(1.0, 1.4, 0.7, 1.1)), 4, 2, time_s=0.02, progress=heard.append)
    assert heard[:3] == [f"list scheduling, placement {i} of 3" for i in (1, 2, 3)]
    assert all("no less than" in what for what in heard[3:])


def test_a_clock_without_a_way_on_says_so() -> None:
    problem = Problem(uniform(2), chain(2), 1)
    order = (Action("F", 1, 0), Action("I", 1, 0), Action("W", 1, 0))
    assert run(problem.steps([(), order]), 4) is None
