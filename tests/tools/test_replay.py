"""Timelines from plans alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stagecut
from stagecut.tools.replay import timeline_of


@pytest.mark.parametrize(
    "devices", [["cpu"] * 4, "sim:4xH100", "sim:2x2xA100-40GB", "sim:2xA100+2xV100", "sim:4xRTX4090"]
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_replayed_step_takes_as_long_as_was_predicted(devices: list[str] | str, replicas: int) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    plan = stagecut.plan(model, devices, example_inputs=(torch.randn(64, 64),), replicas=replicas, costs="analytic")
    assert timeline_of(plan).makespan_s == plan.prediction.step_s
