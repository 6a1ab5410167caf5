"""Ops that name the device that the model was captured on run on the stage's own."""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import stagecut
from stagecut.partitioner.capture import capture
from stagecut.partitioner.split import split
from stagecut.runtime.stage import Seed, build_module


class NamesDevices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def positions(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + torch.arange(3, device=x.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.positions, x, use_reentrant=False)
        return self.second(h) + torch.ones(x.shape[0], 3, device=self.second.weight.device)


def test_a_stage_makes_tensors_on_its_own_device() -> None:
    model, x = NamesDevices(), torch.randn(4, 3)
    plan = stagecut.plan(model, ["cpu"], example_inputs=(x,), costs="analytic")
    caught = capture(model, (x,))
    assert caught.device == "cpu"
    (spec,) = split(caught, plan, defaultdict(bool)).stages
    on_meta = copy.deepcopy(spec)
    for module in on_meta.modules.values():
        module.to("meta")
    held = build_module(on_meta, Seed(), device=torch.device("meta"))
    (result,) = held(x.to("meta")).values()
    assert result.device.type == "meta"
    (result,) = build_module(spec, Seed(), device=torch.device("cpu"))(x).values()
    torch.testing.assert_close(result, model(x), rtol=0, atol=0)
