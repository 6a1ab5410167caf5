"""The choice: which plans are worth trying, and which one trials settle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import stagecut
from stagecut.partitioner.choice import Choice
from stagecut.partitioner.ranking import rank
from stagecut.partitioner.wording import ms


@pytest.fixture(scope="module")
def plans() -> dict[str, stagecut.Plan]:
    """One device, data parallelism and two stages, on CPUs."""
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), torch.randn(8, 4)
    options: Any = {"example_inputs": (x,), "costs": "analytic"}
    return {
        "one device": stagecut.plan(model, ["cpu"], **options),
        "data parallel on 2 devices": stagecut.plan(model, ["cpu", "cpu"], replicas=2, **options),
        "2 stages": stagecut.plan(model, ["cpu", "cpu"], stages=2, **options),
    }


def choice_of(plans: dict[str, stagecut.Plan], **seconds: float) -> Choice:
    """Make a choice among the plans by the seconds that they are predicted to take."""
    made = [
        replace(plans[name.replace("_", " ")], prediction=replace(plans[name.replace("_", " ")].prediction, step_s=s))
        for name, s in seconds.items()
    ]
    return Choice(tuple(sorted(made, key=rank)), (), (), False)


def test_only_plans_near_the_first_are_worth_trying(plans: dict[str, stagecut.Plan]) -> None:
    far = {"one_device": 1.3, "data_parallel_on_2_devices": 1.0}
    assert len(choice_of(plans, **far).contenders()) == 1
    near = choice_of(plans, one_device=1.1, data_parallel_on_2_devices=1.0).contenders()
    assert [len(plan.devices) for plan in near] == [2, 1]


def test_of_each_shape_the_best_is_tried_and_the_plan_to_take_comes_first(plans: dict[str, stagecut.Plan]) -> None:
    found = choice_of(plans, one_device=1.02, data_parallel_on_2_devices=1.0)
    pieces = replace(found.plans[1], n_microbatches=4, prediction=replace(found.plans[1].prediction, step_s=1.01))
    found = replace(found, plans=tuple(sorted([*found.plans, pieces], key=rank)))
    assert [(len(plan.devices), plan.n_microbatches) for plan in found.contenders()] == [(1, 1), (2, 1)]
    assert found.contenders()[0].stages == found.predicted().stages


@pytest.mark.parametrize(
    ("measured", "n_workers"), [((1.0, 0.9), 2), ((0.995, 0.99), 1), ((0.9, 1.0), 1), ((1.0, 0.985), 2)]
)
def test_the_faster_is_taken_and_of_equal_ones_the_simpler(
    plans: dict[str, stagecut.Plan], measured: tuple[float, float], n_workers: int
) -> None:
    choice = choice_of(plans, one_device=1.0, data_parallel_on_2_devices=1.0, **{"2_stages": 1.5})
    contenders = choice.contenders()
    assert [len(plan.devices) for plan in contenders] == [1, 2]
    index, plan = choice.settled(contenders, measured, 6)
    assert len(plan.devices) == len(contenders[index].devices) == n_workers
    assert plan.ops == contenders[index].ops
    first, second = sorted(measured)
    assert plan.reasons[0].startswith("tried, as predictions are too close to tell: ")
    assert plan.reasons[0].endswith("(medians of 6 steps each)")
    assert ms(first) in plan.reasons[0].partition(";")[0]
    assert ms(second) in plan.reasons[0].partition(";")[2]
    assert not any("SHORTER" in line for line in plan.reasons)
    assert len(plan.alternatives) == 2


def test_a_trial_that_was_not_made_is_said(plans: dict[str, stagecut.Plan]) -> None:
    plan = choice_of(plans, one_device=1.0, data_parallel_on_2_devices=1.05).predicted("not tried: why")
    assert plan.reasons[1] == "not tried: why"
    assert plan.reasons[0].startswith("next best: ")
