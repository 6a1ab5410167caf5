"""Times and memory of schedules: against the simulator of programs, and against the papers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import pipelines

from stagecut.errors import ConstraintError, InfeasibleError
from stagecut.partitioner.cluster import Link
from stagecut.partitioner.scheduling import PipelineCosts, Scored, family_schedule, score
from stagecut.partitioner.simulate import StepCosts, simulate
from stagecut.runtime.instructions import Action
from stagecut.runtime.program import lower
from stagecut.runtime.schedules.families import FAMILIES

property_test = settings(max_examples=100, deadline=None, derandomize=True)


def equal(p: int, f: float = 1.0, i: float = 1.0, w: float = 1.0, link_s: float = 0.0, n: int = 1) -> PipelineCosts:
    s = p * n
    return PipelineCosts((f / n,) * s, (i / n,) * s, (w / n,) * s, (1.0 / n,) * s, (0.5 / n,) * s, (link_s,) * (s - 1))


# Qi et al., ICLR 2024, table 5: stages, microbatches, ms of F, B, W and transfers; shares of 1F1B, ZB-H1, ZB-H2.
TABLE_5 = {
    "1.5B": (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083),
    "6.2B": (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323, 0.0698),
    "14.6B": (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397, 0.0672),
    "28.3B": (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421, 0.0641),
}


@pytest.mark.parametrize("model", TABLE_5)
def test_the_zero_bubble_papers_shares_are_reproduced(model: str) -> None:
    p, m, f, i, w, link_s, *wanted = TABLE_5[model]
    made = [family_schedule(name, equal(p, f, i, w, link_s), m).span_bubble for name in ("1f1b", "zb-h1", "zb-h2")]
    assert made == pytest.approx(wanted, abs=5e-5)


@property_test
@given(
    st.sampled_from(sorted(name for name, family in FAMILIES.items() if family.trains)),
    st.integers(1, 4),
    st.integers(1, 9),
    st.data(),
)
def test_the_clock_of_orders_agrees_with_the_simulator_of_programs(
    name: str, p: int, m: int, data: st.DataObject
) -> None:
    family = FAMILIES[name]
    n = p if family.placement == "chain" else 2 * p
    m = max(m, family.least(p))
    costs = replace(data.draw(pipelines(n, p, limited=False)), split_backward=True)
    scored = family_schedule(name, costs, m, p)
    links = {(s, s + 1): Link(seconds, float("inf"), "given") for s, seconds in enumerate(costs.link_s)}
    program = lower(name, scored.problem.layout, scored.orders, m)
    timeline = simulate(
        program,
        StepCosts(
            costs.forward_s,
            tuple(i + w for i, w in zip(costs.backward_input_s, costs.backward_weight_s)),
            {},
            Link(0.0, float("inf"), "none"),
            action_overhead_s=costs.op_overhead_s,
            links=links,
            backward_input_s=costs.backward_input_s,
            backward_weight_s=costs.backward_weight_s,
        ),
    )
    assert timeline.makespan_s == pytest.approx(scored.makespan_s)
    assert timeline.bubble == pytest.approx(scored.bubble, abs=1e-9)
    for w in range(p):
        assert timeline.peak_in_flight(w) == scored.peak_in_flight[w]
        spans = [span for span in timeline.spans if span.worker == w and span.op in "FBIW"]
        assert [span.start_s for span in spans] == pytest.approx(list(scored.starts_s(w)))


def test_bytes_are_held_from_the_forward_and_released_in_two_parts() -> None:
    costs = PipelineCosts((1.0,), (1.0,), (1.0,), (10.0,), (4.0,), ())
    made = family_schedule("zb-h1", costs, 1)

    def peak(text: str) -> float:
        orders = (tuple(Action(token[0], 0, int(token[1:])) for token in text.split()),)
        problem = replace(made.problem, n_microbatches=1 + max(a.microbatch for a in orders[0]))
        return score("by hand", problem, orders).peak_bytes[0]

    assert peak("F0 I0 W0 F1 I1 W1") == 10
    assert peak("F0 I0 F1 I1 W0 W1") == 14
    assert peak("F0 F1 I0 W0 I1 W1") == 20
    assert peak("F0 F1 B0 F2 B1 B2") == 20


BY_HAND = {
    "there twice": "0F0 0F0 0B0 0F1 0B1",
    "comes before F0.1": "0F0 0B0 0B1 0F1",
    "comes before I0.1": "0F0 0B0 0F1 0W1 0I1",
    "does not compute all of microbatch 1": "0F0 0B0 0F1",
    "computes the input gradient again": "0F0 0B0 0F1 0B1 0I1 0W1",
    "not there": "0F0 0B0 0F1 0B1 0F2 0B2",
}


def orders_of(*rows: str) -> tuple[tuple[Action, ...], ...]:
    return tuple(tuple(Action(t[1], int(t[0]), int(t[2])) for t in row.split()) for row in rows)


@pytest.mark.parametrize("why", BY_HAND)
def test_what_is_no_schedule_is_refused_with_the_computation_named(why: str) -> None:
    problem = family_schedule("1f1b", equal(1), 2).problem
    with pytest.raises(ConstraintError, match=why):
        score("by hand", problem, orders_of(BY_HAND[why]))


def test_orders_that_wait_for_each_other_are_refused() -> None:
    problem = family_schedule("1f1b", equal(2), 2).problem
    with pytest.raises(ConstraintError, match="wait for each other"):
        score("by hand", problem, orders_of("0F0 0B0 0F1 0B1", "1F0 1F1 1B1 1B0"))
    with pytest.raises(ConstraintError, match="of a stage that worker 1 owns"):
        score("by hand", problem, orders_of("0F0 1F0", ""))


def test_more_than_the_memory_is_refused_by_how_much() -> None:
    costs = replace(equal(4), memory_bytes=(3.0,) * 4)
    with pytest.raises(InfeasibleError, match="holds 4 bytes on worker 0, 1 more than its memory_bytes of 3"):
        family_schedule("1f1b", costs, 8)


def test_half_backwards_need_leave() -> None:
    costs = replace(equal(2), split_backward=False)
    with pytest.raises(ConstraintError, match="split_backward is false"):
        family_schedule("zb-h1", costs, 4)
    assert family_schedule("1f1b", costs, 4).makespan_s == pytest.approx(3 * 5)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"forward_s": ()}, "at least one stage"),
        ({"backward_input_s": (1.0,)}, "backward_input_s must have one number for each of 2 stages"),
        ({"link_s": (0.1, 0.1)}, "one number for each of 1 boundaries"),
        ({"backward_weight_s": (1.0, -1.0)}, r"backward_weight_s\[1\] must be finite and not negative, got -1"),
        ({"weight_grad_bytes": (2.0, 0.0)}, r"weight_grad_bytes\[0\] is 2, more than activation_bytes\[0\], 1"),
        ({"memory_bytes": (-1.0, 1.0)}, "memory_bytes must not be negative"),
    ],
)
def test_costs_that_make_no_sense_are_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ConstraintError, match=why):
        replace(equal(2), **changes)


@pytest.mark.parametrize(
    ("name", "n_stages", "n_workers", "why"),
    [
        ("zb-v", 6, 2, "a V placement has two stages per worker: 4 on 2 workers, got 6"),
        ("interleaved-1f1b", 6, None, "6 stages on how many workers"),
        ("interleaved-1f1b", 6, 4, "6 stages cannot be spread evenly over 4 workers"),
        ("gpipe", 2, 2, "unknown schedule 'gpipe'; known: fill-drain, 1f1b"),
    ],
)
def test_stages_that_do_not_fit_the_workers_are_refused(
    name: str, n_stages: int, n_workers: int | None, why: str
) -> None:
    with pytest.raises(ConstraintError, match=why):
        family_schedule(name, equal(n_stages), 4, n_workers)


@property_test
@given(st.integers(1, 5), st.integers(1, 2), st.integers(1, 9), st.data())
def test_forwards_alone_have_a_bound_of_their_own(p: int, chunks: int, m: int, data: st.DataObject) -> None:
    costs = data.draw(pipelines(p * chunks, p, limited=False))
    made = family_schedule("forward-only", costs, m, p)
    assert made.lower_bound_s <= made.makespan_s * (1 + 1e-9)
    if p == 1 or m == 1:
        assert made.lower_bound_s == pytest.approx(made.makespan_s)


def test_idle_time_of_the_span_leaves_out_the_way_to_the_last_worker() -> None:
    made: Scored = family_schedule("zb-h2", equal(4), 12)
    assert made.span_bubble == pytest.approx(0.0)
    assert made.bubble == pytest.approx(3 / 39)
    assert made.longest_span_s == pytest.approx(36)
