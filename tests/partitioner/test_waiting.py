"""Waiting and the critical path of timelines: laws over schedules and costs, and cases worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.partitioner.plan import FORMAT, LinkRecord, OpRecord, Plan, Prediction, StageRecord, Timing, WireRecord
from stagecut.partitioner.waiting import (
    CAUSES,
    DRAINING,
    FILLING,
    REPLICAS,
    RUNTIME,
    TRANSFER,
    WORK,
    critical_path,
    waits,
)
from stagecut.runtime.program import Span, Timeline

SCHEDULES = ("fill-drain", "1f1b", "eager-1f1b", "zb-h1", "zb-h2")


def plan_of(
    seconds: list[tuple[float, float]], schedule: str, n_microbatches: int, latency_s: float = 0.0, n_replicas: int = 1
) -> Plan:
    """A chain of stages with these forward and backward seconds; a skip from the first to the last."""
    n = len(seconds)
    ops = [
        OpRecord(f"op{s}", "relu", "", None, s, (f"op{s - 1}",) if s else ("x",), f, b, 8, 8, "analytic", b / 2)
        for s, (f, b) in enumerate(seconds)
    ]
    wires = [WireRecord(f"op{s}", s, (s + 1,), 8, True) for s in range(n - 1)]
    if n > 2:
        ops[-1] = replace(ops[-1], inputs=(f"op{n - 2}", "op0"))
        wires[0] = replace(wires[0], targets=(1, n - 1))
    stages = [
        StageRecord(
            s, ("cpu",) * n_replicas, tuple(range(s * n_replicas, (s + 1) * n_replicas)), f, b, 8, 8, n, 64, 2.0**62,
            backward_weight_s=b / 2,
        )
        for s, (f, b) in enumerate(seconds)
    ]  # fmt: skip
    links = tuple(LinkRecord(a, b, latency_s, 1e12) for a in range(n) for b in range(a + 1, n))
    prediction = Prediction(1.0, 0.0, 1.0, 1.0, True, 1.0, "analytic")
    return Plan(
        FORMAT, "Chain", "0" * 16, n_microbatches * n_replicas, n_microbatches, schedule, ("x",), tuple(ops),
        tuple(stages), tuple(wires), prediction, (), timing=Timing(links=links if latency_s else ()),
    )  # fmt: skip


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    part = st.floats(0.01, 1.0)
    seconds = draw(st.lists(st.tuples(part, part), min_size=1, max_size=5))
    latency_s = draw(st.sampled_from([0.0, 0.05, 2.0]))
    return plan_of(seconds, draw(st.sampled_from(SCHEDULES)), draw(st.integers(1, 6)), latency_s)


def idle_s(timeline: Timeline, worker: int) -> float:
    """Measure by looking at every moment between two events whether the worker does something."""
    mine = [s for s in timeline.spans if s.worker == worker and s.end_s > s.start_s and not s.op.startswith("rec")]
    times = sorted({0.0, timeline.makespan_s, *(s.start_s for s in mine), *(s.end_s for s in mine)})
    idle = 0.0
    for a, b in itertools.pairwise(times):
        if not any(s.start_s <= (a + b) / 2 < s.end_s for s in mine):
            idle += b - a
    return idle


@settings(max_examples=120, derandomize=True)
@given(plans())
def test_every_idle_moment_has_one_cause(plan: Plan) -> None:
    timeline = plan.predicted
    found = waits(plan, timeline)
    assert all(wait.cause in CAUSES and wait.end_s > wait.start_s for wait in found)
    for worker in range(timeline.n_workers):
        own = sorted((w.start_s, w.end_s) for w in found if w.worker == worker)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(own))
        assert abs(sum(end - start for start, end in own) - idle_s(timeline, worker)) < 1e-9


@settings(max_examples=120, derandomize=True)
@given(plans())
def test_the_critical_path_is_as_long_as_the_step(plan: Plan) -> None:
    timeline = plan.predicted
    path = [timeline.spans[index] for index in critical_path(plan, timeline)]
    assert path[-1].end_s == timeline.makespan_s
    for before, after in itertools.pairwise(path):
        assert before.end_s <= after.end_s
    if not plan.timing.links:  # nothing but work
        assert abs(sum(span.end_s - span.start_s for span in path) - timeline.makespan_s) < 1e-9
        for before, after in itertools.pairwise(path):
            assert abs(before.end_s - after.start_s) < 1e-9
    assert path[0].start_s < 1e-9


@settings(max_examples=120, derandomize=True)
@given(plans())
def test_the_critical_path_stays_on_a_worker_only_while_that_worker_does_not_wait(plan: Plan) -> None:
    timeline = plan.predicted
    waited = {(w.worker, w.end_s) for w in waits(plan, timeline) if w.awaited >= 0}
    path = [timeline.spans[index] for index in critical_path(plan, timeline)]
    for before, after in itertools.pairwise(path):
        if before.worker == after.worker:
            assert (after.worker, after.start_s) not in waited


def causes(plan: Plan, timeline: Timeline, worker: int) -> list[tuple[str, float, float]]:
    return [(w.cause, round(w.start_s, 6), round(w.end_s, 6)) for w in waits(plan, timeline) if w.worker == worker]


def test_two_stages_one_microbatch() -> None:
    plan = plan_of([(1.0, 2.0), (1.0, 2.0)], "fill-drain", 1)
    assert causes(plan, plan.predicted, 0) == [(WORK, 1.0, 4.0)]
    assert causes(plan, plan.predicted, 1) == [(FILLING, 0.0, 1.0), (DRAINING, 4.0, 6.0)]
    (wait,) = [w for w in waits(plan, plan.predicted) if w.worker == 0]
    awaited = plan.predicted.spans[wait.awaited]
    assert (awaited.op, awaited.stage, awaited.microbatch) == ("B", 1, 0)


def test_a_packet_on_its_way_is_told_from_the_work_before_it() -> None:
    plan = plan_of([(1.0, 2.0), (1.0, 2.0)], "fill-drain", 1, latency_s=0.5)
    assert causes(plan, plan.predicted, 0) == [(WORK, 1.0, 4.5), (TRANSFER, 4.5, 5.0)]


def test_in_a_measured_step_a_packet_that_had_come_is_not_waited_for() -> None:
    plan = plan_of([(1.0, 2.0), (1.0, 2.0)], "fill-drain", 1, latency_s=0.1)
    spans = (
        Span(0, "F", 0, 0, 0.0, 1.0),
        Span(0, "reduce", 0, -1, 1.0, 4.0),  # busy with something else until long after the gradient came
        Span(0, "B", 0, 0, 4.5, 6.5),
        Span(1, "F", 1, 0, 1.1, 2.0),
        Span(1, "B", 1, 0, 2.0, 3.0),
        Span(1, "send gradient", 1, 0, 3.0, 3.1),
    )
    assert causes(plan, Timeline("measured", 2, spans), 0) == [(RUNTIME, 4.0, 4.5)]


def test_a_packet_is_not_taken_for_the_later_one_that_goes_back() -> None:
    plan = plan_of([(1.0, 2.0), (1.0, 2.0)], "fill-drain", 1, latency_s=0.1)
    spans = (
        Span(0, "F", 0, 0, 0.0, 1.0),
        Span(0, "send activation", 0, 0, 1.0, 1.1),
        Span(0, "send gradient", 0, 0, 8.0, 8.1),
        Span(1, "F", 1, 1, 0.0, 4.0),
        Span(1, "F", 1, 0, 9.0, 10.0),
    )
    assert causes(plan, Timeline("measured", 2, spans), 1) == [(RUNTIME, 4.0, 9.0)]


def test_a_late_packet_is_on_the_critical_path_and_not_the_work_before_it() -> None:
    plan = plan_of([(1.0, 1.0), (1.0, 1.0)], "1f1b", 1, latency_s=3.0)
    path = [plan.predicted.spans[index] for index in critical_path(plan, plan.predicted)]
    assert [(span.op, span.stage) for span in path] == [("F", 0), ("F", 1), ("B", 1), ("B", 0)]


def test_replicas_wait_for_each_other_before_they_reduce() -> None:
    plan = plan_of([(1.0, 2.0)], "fill-drain", 1, n_replicas=2)
    spans = (
        Span(0, "F", 0, 0, 0.0, 1.0),
        Span(0, "B", 0, 0, 1.0, 3.0),
        Span(0, "reduce", 0, -1, 4.0, 5.0),
        Span(1, "F", 0, 1, 0.0, 1.5),
        Span(1, "B", 0, 1, 1.5, 4.0),
        Span(1, "reduce", 0, -1, 4.0, 5.0),
    )
    timeline = Timeline("simulated", 2, spans)
    assert causes(plan, timeline, 0) == [(REPLICAS, 3.0, 4.0)]
    path = [(timeline.spans[i].worker, timeline.spans[i].op) for i in critical_path(plan, timeline)]
    assert path[:2] == [(1, "F"), (1, "B")]
    assert path[-1][1] == "reduce"


def test_nothing_waits_in_no_step() -> None:
    plan = plan_of([(1.0, 2.0)], "1f1b", 1)
    empty = Timeline("simulated", 1, ())
    assert waits(plan, empty) == []
    assert critical_path(plan, empty) == []
