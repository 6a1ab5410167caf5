"""Plans with several stages on each worker: which are made, what they hold, and that they say so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from score_plan import score_plan
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.errors import ConstraintError, PlanError
from stagecut.partitioner.explain import describe_shape
from stagecut.partitioner.placing import owners_of, placed, placement_of
from stagecut.partitioner.plan import parse
from stagecut.records import to_json
from stagecut.runtime.schedules import TRAINING_SCHEDULES
from stagecut.runtime.schedules.families import FAMILIES

WITH_CHUNKS = [name for name in TRAINING_SCHEDULES if FAMILIES[name].placement != "chain"]
SIM = "sim:4xA100-80GB"


class Tied(nn.Module):
    """The first and the last op share the largest weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5000, 32)
        self.body = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.body:
            x = x + torch.tanh(layer(x))
        return F.linear(x, self.embed.weight)


def layers(n: int = 12) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(n)))


def plan_of(model: nn.Module, devices: Any = SIM, rows: int = 64, **wishes: Any) -> stagecut.Plan:
    example = torch.randint(5000, (rows, 3)) if isinstance(model, Tied) else torch.randn(rows, 64)
    return stagecut.plan(model, devices, example_inputs=(example,), costs="analytic", **wishes)


@pytest.mark.parametrize("name", WITH_CHUNKS)
def test_a_schedule_brings_its_placement(name: str) -> None:
    plan = plan_of(layers(), devices="sim:2xA100-80GB", replicas=1, schedule=name, microbatches=4)
    assert [stage.workers for stage in plan.stages] == (
        [(0,), (1,), (1,), (0,)] if FAMILIES[name].placement == "vee" else [(0,), (1,), (0,), (1,)]
    )
    assert plan.schedule == name
    assert plan.devices == ("A100:0", "A100:1")
    assert describe_shape(plan) == "4 stages on 2 devices"
    assert not score_plan(plan).faults
    assert parse(to_json(plan)) == plan


@pytest.mark.parametrize("name", WITH_CHUNKS)
def test_replicas_of_several_stages(name: str) -> None:
    plan = plan_of(layers(), replicas=2, schedule=name, microbatches=4)
    assert {stage.workers for stage in plan.stages} == {(0, 1), (2, 3)}
    assert describe_shape(plan) == "4 stages on 2 devices x 2 replicas"
    assert not score_plan(plan).faults


def test_stages_say_how_many_each_device_has() -> None:
    plan = plan_of(layers(), devices="sim:2xA100-80GB", stages=6, microbatches=6)
    assert [stage.workers for stage in plan.stages] == [(0,), (1,)] * 3
    assert FAMILIES[plan.schedule].placement == "loop"
    assert not score_plan(plan).faults


def test_more_stages_than_devices_of_one_are_refused() -> None:
    with pytest.raises(ConstraintError, match="stages must be 1 to the number of devices, 1; got 2"):
        plan_of(layers(), devices="sim:1xA100-80GB", stages=2)
    with pytest.raises(ConstraintError, match="devices, 2, or go equally many to each of 2 or more; got 5"):
        plan_of(layers(), devices="sim:2xA100-80GB", stages=5)


def test_stages_that_a_schedule_cannot_place_are_refused() -> None:
    with pytest.raises(ConstraintError, match="on every device, so stages=2 do not go on 2 devices"):
        plan_of(layers(), devices="sim:2xA100-80GB", stages=2, schedule="zb-v")


def test_too_few_microbatches_name_what_works() -> None:
    with pytest.raises(ConstraintError, match="dualpipe-v on 2 devices needs at least 4 microbatches, got 2") as caught:
        plan_of(layers(), devices="sim:2xA100-80GB", replicas=1, schedule="dualpipe-v", microbatches=2)
    assert "microbatches=4" in str(caught.value.hint)


def test_several_stages_are_among_what_the_planner_tries() -> None:
    plan = plan_of(layers(16), devices="sim:2xA100-80GB", rows=64)
    shapes = {(other.replicas, other.n_workers) for other in plan.alternatives}
    assert ((1, 1, 1, 1), 2) in shapes


def test_the_planner_takes_several_stages_where_they_are_faster() -> None:
    """With few microbatches, half as long a stage fills in half the time."""
    plan = plan_of(layers(16), devices="sim:4xA100-80GB", stages=8, microbatches=4)
    chain = plan_of(layers(16), devices="sim:4xA100-80GB", stages=4, microbatches=4, schedule="1f1b", replicas=1)
    assert len(plan.stages) == 8
    assert len(plan.devices) == 4
    assert plan.prediction.step_s < chain.prediction.step_s
    placements = {FAMILIES[other.schedule].placement for other in plan.alternatives if len(other.replicas) == 8}
    assert placements == {"loop", "vee"}
    assert not score_plan(plan).faults


def test_a_tie_on_one_worker_is_held_once() -> None:
    devices = "sim:2xA100-80GB"
    vee = plan_of(Tied(), devices=devices, replicas=1, schedule="zb-v", microbatches=4)
    loop = plan_of(Tied(), devices=devices, replicas=1, schedule="interleaved-1f1b", microbatches=4)
    table = 5000 * 32 * 4
    assert vee.stages[0].parameter_bytes >= table > vee.stages[3].parameter_bytes
    assert loop.stages[3].parameter_bytes >= table, "on another worker it is another copy"
    for plan in (vee, loop):
        assert not score_plan(plan).faults


def test_memory_counts_all_stages_of_a_device() -> None:
    free = plan_of(layers(), devices="sim:2xA100-80GB", replicas=1, schedule="interleaved-1f1b", microbatches=4)
    most = max(stage.device_bytes for stage in free.stages)
    assert most > max(stage.memory_bytes for stage in free.stages)
    wishes = {"devices": "sim:2xA100-80GB", "replicas": 1, "schedule": "interleaved-1f1b", "microbatches": 4}
    tight = plan_of(layers(), memory_bytes=0.97 * most, **wishes)
    assert any(stage.recompute for stage in tight.stages) or tight.stage_of != free.stage_of
    assert max(stage.device_bytes for stage in tight.stages) <= 0.97 * most
    assert not score_plan(tight).faults
    with pytest.raises(stagecut.InfeasibleError):
        plan_of(layers(), memory_bytes=0.2 * most, **wishes)


def test_workers_of_a_plan_from_elsewhere_are_checked() -> None:
    plan = plan_of(layers(), devices="sim:2xA100-80GB", replicas=1, schedule="zb-v", microbatches=4)

    def refused(workers: list[tuple[int, ...]], what: str) -> None:
        stages = tuple(replace(stage, workers=own) for stage, own in zip(plan.stages, workers))
        with pytest.raises(PlanError, match=what):
            parse(to_json(replace(plan, stages=stages)))

    refused([(0,), (1,), (1,), (2,)], r"\$.schedule: zb-v needs 2 stages per worker")
    refused([(0,), (2,), (2,), (0,)], "numbered from 0 without gaps")
    refused([(0,), (1,), (1, 0), (0,)], r"\$.stages\[2\].workers: expected a worker of its own for each")
    refused([(0,), (0,), (1,), (1,)], r"\$.stages\[1\].workers: worker 0 is on A100:1 here and on A100:0")
    refused([(0,), (1,), (-1,), (0,)], "numbered from 0, got -1")


def test_a_plan_of_several_stages_fits_devices_that_are_nested_by_worker() -> None:
    model, x = layers(4), torch.randn(8, 64)
    plan = plan_of(model, devices=["cpu", "cpu"], replicas=1, schedule="zb-v", microbatches=2)
    for devices in (["cpu", "cpu"], [["cpu"], ["cpu"]]):
        with stagecut.compile(model, devices, loss_fn=F.mse_loss, plan=plan, launch="inline") as pm:
            assert pm.verify(x, target=x).ok
    with pytest.raises(ConstraintError, match="the plan is for devices"):
        stagecut.compile(model, [["cpu", "cpu"]], loss_fn=F.mse_loss, plan=plan, launch="inline")


def test_placements_are_told_apart() -> None:
    owners = ((0, 1), (2, 3))
    assert placement_of(owners) == "chain"
    assert placement_of(placed(owners, "loop", 3)) == "loop"
    assert placement_of(placed(owners, "vee", 2)) == "vee"
    assert placement_of((*owners, (2, 3))) == "other"
    assert owners_of(placed(owners, "vee", 2)) == owners
