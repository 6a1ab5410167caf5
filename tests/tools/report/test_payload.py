"""What the page is told of memory and candidates agrees with the plan."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import stagecut
from stagecut.models.registry import load_model
from stagecut.partitioner.plan import Alternative
from stagecut.tools.report.payload import Shown, payload


def test_who_is_alive_adds_up_to_the_peak(plan, simulated_plan):
    for shown in (plan, simulated_plan, replace(plan, stages=tuple(replace(s, recompute=True) for s in plan.stages))):
        for worker in payload(Shown("plan", shown))["memory"]:
            assert sum(n_bytes for _, n_bytes in worker["alive"]) == pytest.approx(worker["peak_bytes"])
            assert max(n_bytes for _, n_bytes in worker["steps"]) <= worker["peak_bytes"]


def test_the_peak_is_what_the_plan_says_of_the_device(plan):
    memory = payload(Shown("plan", plan))["memory"]
    assert [worker["peak_bytes"] for worker in memory] == [stage.device_bytes for stage in plan.stages]


def test_candidates_are_written_as_calls(plan):
    others = (
        Alternative("zb-h1", 8, 0.5, 4, (2, 2), (0, 1), 1024),
        Alternative("1f1b", 4, 0.5, 4, (3, 1), (1,), 1024),
        Alternative("given", 4, 0.5, 3, (1, 1, 1), (), 1024),
    )
    calls = [each["call"] for each in payload(Shown("plan", replace(plan, alternatives=others)))["candidates"]]
    costs, limit = "costs='analytic'", f"memory_bytes={int(plan.stages[0].memory_limit_bytes)}"
    assert calls == [
        "stagecut.compile(model, devices, plan='plan.json')",
        f"stagecut.compile(model, devices[:4], stages=2, replicas=2, microbatches=8, schedule='zb-h1', {costs}, "
        f"recompute=True, {limit})",
        f"stagecut.compile(model, devices[:4], stages=2, replicas=[3, 1], microbatches=4, schedule='1f1b', {costs}, "
        f"{limit})",
        "",
    ]


def test_a_limit_that_all_workers_have_is_part_of_the_calls(plan):
    other = Alternative("1f1b", 4, 0.5, 3, (1, 1, 1), (), 1024)

    def call(*limits):
        stages = tuple(replace(s, memory_limit_bytes=limit) for s, limit in zip(plan.stages, limits))
        shown = replace(plan, stages=stages, alternatives=(other,))
        return payload(Shown("plan", shown))["candidates"][1]["call"]

    assert call(8e9, 8e9, 8e9).endswith(", recompute=False, memory_bytes=8000000000)")
    assert call(8e9, 8e9, 16e9).endswith(", recompute=False)")
    assert call(2.0**62, 2.0**62, 2.0**62).endswith(", recompute=False)")


def test_a_configuration_is_remembered_as_the_plan_says_it(plan):
    chosen = plan.as_alternative()
    (first, *_) = payload(Shown("plan", plan))["candidates"]
    assert (chosen.n_workers, chosen.replicas, chosen.recomputed) == (len(plan.devices), (1, 1, 1), ())
    assert (chosen.step_s, chosen.memory_bytes) == (plan.prediction.step_s, max(s.device_bytes for s in plan.stages))
    assert (first["step_s"], first["memory_bytes"], first["chosen"]) == (chosen.step_s, chosen.memory_bytes, True)


class Planner:
    """Stands for the module in a call that is copied from the page: plans, and starts nothing."""

    @staticmethod
    def compile(model, devices, **given):
        return stagecut.plan(model, devices, example_inputs=(torch.zeros(16, 64),), **given)


def test_what_is_copied_gives_the_configuration_that_it_stands_beside():
    model, devices = load_model("demo:mlp").module, ["cpu"] * 2
    plan = stagecut.plan(model, devices, example_inputs=(torch.zeros(16, 64),), costs="analytic")
    assert {sum(other.replicas) > other.n_workers for other in plan.alternatives} == {True, False}
    for each, other in list(zip(payload(Shown("a", plan))["candidates"][1:], plan.alternatives))[:12]:
        again = eval(each["call"], {"stagecut": Planner, "model": model, "devices": devices})
        assert (again.schedule, again.n_microbatches, len(again.devices)) == (
            other.schedule, other.n_microbatches, other.n_workers,
        )  # fmt: skip
        assert tuple(len(stage.devices) for stage in again.stages) == other.replicas
        assert tuple(stage.index for stage in again.stages if stage.recompute) == other.recomputed


def test_slower_links_never_make_the_step_shorter(simulated_plan):
    links = payload(Shown("plan", simulated_plan))["links"]
    steps = [step_s for _, step_s, _ in links]
    assert len(steps) > 4
    assert steps == sorted(steps, reverse=True)
    assert {factor: step_s for factor, step_s, _ in links}[1.0] == simulated_plan.predicted.makespan_s


def test_everything_is_plain_json_with_finite_numbers(hostile_plan, simulated_plan):
    for plan in (hostile_plan, simulated_plan):
        json.dumps(payload(Shown("plan", plan)), allow_nan=False)
