"""Schedules: what each worker computes in which order, and the idle time that follows."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stagecut
from stagecut.errors import ConstraintError
from stagecut.partitioner.cluster import Link
from stagecut.partitioner.placing import placed
from stagecut.partitioner.simulate import StepCosts, simulate
from stagecut.runtime.instructions import Action, Layout
from stagecut.runtime.program import Timeline, check, lower
from stagecut.runtime.schedules import ANY_REPLICAS, IN_COLUMNS, SCHEDULES, of_part, schedule
from stagecut.runtime.schedules.families import FAMILIES
from stagecut.runtime.schedules.one_f_one_b import warm_up

property_test = settings(max_examples=100, deadline=None, derandomize=True)
NO_LINK = Link(0.0, float("inf"), "none")


def chain(*replicas: int) -> Layout:
    """Stages in a row with the given replica counts."""
    workers, first = [], 0
    for count in replicas:
        workers.append(tuple(range(first, first + count)))
        first += count
    wires = tuple((s, s + 1) for s in range(len(replicas) - 1))
    return Layout(tuple(workers), wires, wires)


def run(name: str, layout: Layout, m: int, forward_s: float = 1.0, backward_s: float = 2.0) -> Timeline:
    p = layout.n_stages
    costs = StepCosts((forward_s,) * p, (backward_s,) * p, {}, NO_LINK)
    return simulate(lower(name, layout, schedule(name, layout, m), m), costs)


replica_counts = st.lists(st.integers(1, 3), min_size=1, max_size=5)


@property_test
@given(st.sampled_from(sorted({*SCHEDULES} - {*IN_COLUMNS})), replica_counts, st.integers(1, 9))
def test_each_stage_runs_each_microbatch_once_per_kind_on_its_worker(name: str, replicas: list[int], m: int) -> None:
    layout = chain(*replicas)
    orders = schedule(name, layout, m)
    kinds = {"forward-only": "F", "backward-only": "B"}.get(name, "FB")
    wanted = {Action(kind, s, i) for kind in kinds for s in range(layout.n_stages) for i in range(m)}
    given_out = [action for order in orders for action in order]
    assert len(orders) == layout.n_workers
    assert len(given_out) == len(wanted)
    assert set(given_out) == wanted
    assert all(
        layout.worker_of(action.stage, action.microbatch) == worker
        for worker, order in enumerate(orders)
        for action in order
    )


@property_test
@given(st.sampled_from(ANY_REPLICAS), replica_counts, st.integers(1, 9))
def test_a_backward_comes_after_its_forward_and_gradients_are_summed_in_order(
    name: str, replicas: list[int], m: int
) -> None:
    for order in schedule(name, chain(*replicas), m):
        place = {action: position for position, action in enumerate(order)}
        assert all(place[Action("F", a.stage, a.microbatch)] < place[a] for a in order if a.kind == "B")
        for kind in "FB":
            microbatches = [a.microbatch for a in order if a.kind == kind]
            assert microbatches == sorted(microbatches)


def test_fill_drain_is_the_grid_of_its_description() -> None:
    assert [" ".join(map(str, order)) for order in schedule("fill-drain", chain(1, 1), 3)] == [
        "F0.0 F0.1 F0.2 B0.0 B0.1 B0.2",
        "F1.0 F1.1 F1.2 B1.0 B1.1 B1.2",
    ]


def test_1f1b_is_the_grid_of_its_description() -> None:
    assert [" ".join(map(str, order)) for order in schedule("1f1b", chain(1, 1, 1), 4)] == [
        "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3",
        "F1.0 F1.1 B1.0 F1.2 B1.1 F1.3 B1.2 B1.3",
        "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 F2.3 B2.3",
    ]


@pytest.mark.parametrize("name", ANY_REPLICAS)
@pytest.mark.parametrize("p", [1, 2, 3, 5])
@pytest.mark.parametrize("m", [1, 2, 5, 8])
def test_the_bubble_of_equal_stages_is_the_closed_form(name: str, p: int, m: int) -> None:
    assert run(name, chain(*[1] * p), m).bubble == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("name", ANY_REPLICAS)
def test_equal_replicas_of_every_stage_have_the_bubble_of_one_pipeline(name: str, replicas: int) -> None:
    p, m = 3, 4
    timeline = run(name, chain(*[replicas] * p), m * replicas)
    assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert timeline.makespan_s == pytest.approx(run(name, chain(*[1] * p), m).makespan_s)


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_fill_drain_holds_every_microbatch_at_once(p: int, m: int) -> None:
    timeline = run("fill-drain", chain(*[1] * p), m)
    assert [timeline.peak_in_flight(worker) for worker in range(p)] == [m] * p


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_1f1b_holds_as_many_microbatches_as_stages_follow(p: int, m: int) -> None:
    timeline = run("1f1b", chain(*[1] * p), m)
    assert [timeline.peak_in_flight(worker) for worker in range(p)] == [min(p - s, m) for s in range(p)]


def test_eager_1f1b_hides_transfers_that_1f1b_waits_for() -> None:
    p, m = 4, 12
    costs = StepCosts((1.0,) * p, (2.0,) * p, {}, Link(0.5, float("inf"), "slow"))
    layout = chain(*[1] * p)
    steps = {name: simulate(lower(name, layout, schedule(name, layout, m), m), costs) for name in ANY_REPLICAS}
    assert steps["eager-1f1b"].makespan_s == pytest.approx(3.0 * m + (p - 1) * (3.0 + 2 * 0.5))
    assert steps["1f1b"].makespan_s > steps["eager-1f1b"].makespan_s + 1.0
    assert [steps["eager-1f1b"].peak_in_flight(w) for w in range(p)] == [7, 5, 3, 1]


@property_test
@given(replica_counts, st.integers(1, 9))
def test_1f1b_never_holds_more_than_its_warm_up_with_any_replicas(replicas: list[int], m: int) -> None:
    layout = chain(*replicas)
    timeline = run("1f1b", layout, m)
    for s, owners in enumerate(layout.workers):
        for r, worker in enumerate(owners):
            mine = len(layout.microbatches_of(s, r, m))
            assert timeline.peak_in_flight(worker) == min(warm_up(layout, s), mine)


def test_a_stage_warms_up_for_the_workers_that_follow_it() -> None:
    layout = chain(2, 1, 3)
    assert [warm_up(layout, s) for s in range(3)] == [3, 4, 1]


def test_unequal_replicas_that_balance_the_work_keep_all_busy_in_the_steady_state() -> None:
    """A stage that takes twice as long on two workers keeps up with one worker of half the time."""
    layout, m = chain(1, 2), 20
    program = lower("1f1b", layout, schedule("1f1b", layout, m), m)
    timeline = simulate(program, StepCosts((1.0, 2.0), (2.0, 4.0), {}, NO_LINK))
    assert timeline.makespan_s <= m * 3.0 + 2 * 6.0
    assert timeline.bubble < 0.2


def test_an_unknown_schedule_and_no_microbatch_are_refused() -> None:
    with pytest.raises(
        ConstraintError, match=r"unknown schedule 'gpipe'; known: 1f1b, fill-drain, eager-1f1b, interleaved-1f1b, "
    ):
        schedule("gpipe", chain(1), 1)
    with pytest.raises(ConstraintError, match="at least one microbatch, got 0"):
        schedule("1f1b", chain(1), 0)


def test_1f1b_of_a_worker_with_two_stages_is_refused_and_fill_drain_runs_it() -> None:
    layout = Layout(((0,), (0,)), ((0, 1),), ((0, 1),))
    with pytest.raises(ConstraintError, match="worker 0 owns several: use 'fill-drain'"):
        schedule("1f1b", layout, 2)
    assert [str(action) for action in schedule("fill-drain", layout, 1)[0]] == ["F0.0", "F1.0", "B1.0", "B0.0"]


@property_test
@given(st.sampled_from(IN_COLUMNS), st.integers(1, 3), st.integers(1, 2), st.integers(1, 7))
def test_a_batch_that_is_too_short_runs_what_is_left_of_a_longer_ones_order(
    name: str, p: int, n_replicas: int, m: int
) -> None:
    owners = tuple(tuple(range(w * n_replicas, (w + 1) * n_replicas)) for w in range(p))
    placement = FAMILIES[name].placement
    workers = owners if placement == "chain" else placed(owners, placement, 2)
    wires = tuple((s, s + 1) for s in range(len(workers) - 1))
    layout = Layout(workers, wires, wires)
    orders = of_part(name, layout, m)
    check(lower(name, layout, orders, m))
    assert {a.microbatch for order in orders for a in order} == set(range(m))


def test_the_last_rows_of_an_epoch_run_under_a_schedule_that_needs_more() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))).double()
    plain, x = copy.deepcopy(model), torch.randn(9, 4, dtype=torch.float64)
    wishes = {"schedule": "dualpipe-v", "microbatches": 4, "replicas": 1, "costs": "analytic", "launch": "inline"}
    with stagecut.compile(model, [0, 1], loss_fn=nn.functional.mse_loss, **wishes) as pm:
        for rows in (8, 1, 3):
            pm.zero_grad()
            plain.zero_grad()
            wanted = nn.functional.mse_loss(plain(x[:rows]), x[:rows])
            wanted.backward()
            torch.testing.assert_close(pm.step(x[:rows], target=x[:rows]).loss, wanted.detach())
            for own, other in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(own.grad, other.grad)
