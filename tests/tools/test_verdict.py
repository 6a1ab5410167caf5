from dataclasses import replace

import pytest

from stagecut.runtime.program import Span, Timeline
from stagecut.tools.verdict import bytes_into, idle_s, judge, slowest_stage


def with_prediction(plan, **changes):
    return replace(plan, prediction=replace(plan.prediction, **changes))


def test_a_plan_file_is_simulated_as_it_was_when_it_was_made(plan, simulated_plan):
    for made in (plan, simulated_plan):
        assert made.predicted.makespan_s == made.prediction.step_s
        assert made.predicted.bubble == made.prediction.bubble


def test_the_line_names_step_bubble_schedule_limit_and_one_device(plan, timeline):
    line = judge(plan, timeline).line()
    for part in ("predicted step", "bubble", "1f1b, 4 microbatches, 8 rows", "limited by stage", "one device"):
        assert part in line.lower()


@pytest.mark.parametrize(
    ("one_device_s", "said"),
    [(0.1, "ONE DEVICE IS FASTER: 100 ms, 2.00 times as fast"), (0.4, "one device takes 400 ms, 2.00 times as long")],
)
def test_it_is_said_when_one_device_is_faster(plan, timeline, one_device_s, said):
    changed = with_prediction(plan, step_s=0.2, one_device_s=one_device_s)
    assert judge(changed, timeline).one_device == said


def test_the_limit_is_the_stage_with_the_most_compute(plan):
    slow = replace(plan.stages[1], forward_s=1.0, backward_s=2.0)
    changed = replace(plan, stages=(plan.stages[0], slow, plan.stages[2]))
    assert slowest_stage(changed).index == 1


def test_a_stage_with_replicas_counts_by_its_share(simulated_plan):
    slow, fast = simulated_plan.stages
    slow = replace(slow, devices=slow.devices[:1], forward_s=3.0, backward_s=3.0)
    fast = replace(fast, forward_s=5.0, backward_s=5.0)
    assert slowest_stage(replace(simulated_plan, stages=(slow, fast))).index == 0


@pytest.mark.parametrize(("optimal", "bound", "said"), [(True, 1.0, "no cut has less"), (False, 1.0, "at most 50%")])
def test_the_cut_is_said_with_its_proof(plan, timeline, optimal, bound, said):
    changed = with_prediction(plan, optimal=optimal, bottleneck_s=1.5, lower_bound_s=bound)
    assert said in judge(changed, timeline).cut


@pytest.mark.parametrize(("used", "said"), [(50, "fits: "), (95, "fits, barely"), (101, "DOES NOT FIT")])
def test_memory_is_judged_at_the_fullest_stage(plan, timeline, used, said):
    stages = (*plan.stages[:2], replace(plan.stages[2], memory_bytes=used, memory_limit_bytes=100.0))
    fit = judge(replace(plan, stages=stages), timeline).fit
    assert fit.startswith(said)
    assert "stage 2" in fit


def test_bytes_are_those_that_arrive_at_a_stage(plan):
    assert bytes_into(plan, 0) == 0
    assert bytes_into(plan, 1) > 0


def test_waiting_is_what_no_instruction_fills():
    spans = (Span(0, "F", 0, 0, 1.0, 2.0), Span(0, "send activation", 0, 0, 1.5, 3.0), Span(0, "B", 0, 0, 4.0, 5.0))
    assert idle_s(Timeline("simulated", 2, (*spans, Span(1, "F", 1, 0, 0.0, 6.0))), 0) == 3.0


def test_who_waits_longest_is_named_with_worker_and_stage(simulated_plan):
    timeline = simulated_plan.predicted
    longest = max(range(timeline.n_workers), key=lambda worker: idle_s(timeline, worker))
    assert f"worker {longest} (stage {longest // 2}) waits longest" in judge(simulated_plan, timeline).waiting
