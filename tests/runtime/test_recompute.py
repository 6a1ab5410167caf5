"""Recompute: the same numbers, with only the inputs of a microbatch kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.errors import StageError
from stagecut.runtime.recompute import recomputed
from stagecut.runtime.seeding import Seed


class Noisy(nn.Module):
    """Batch norm, dropout and a skip: what recompute could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.4), nn.Tanh())
        self.third = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(self.third(self.second(x)) + x)


def stepped(model: nn.Module, x: torch.Tensor, y: torch.Tensor, **wishes) -> tuple[torch.Tensor, dict, dict]:
    own = copy.deepcopy(model)
    torch.manual_seed(5)
    options = {"stages": 2, "microbatches": 3, "costs": "analytic", "launch": "inline", **wishes}
    with stagecut.compile(own, ["cpu", "cpu"], loss_fn=F.cross_entropy, **options) as pm:
        loss = pm.step(x, target=y).loss
        assert [stage.recompute for stage in pm.plan.stages] == [bool(wishes.get("recompute"))] * 2
    return loss, {name: p.grad for name, p in own.named_parameters()}, dict(own.named_buffers())


@pytest.mark.parametrize("schedule", ["1f1b", "fill-drain", "eager-1f1b", "zb-h1"])
def test_gradients_statistics_and_random_numbers_are_those_without_recompute(schedule: str) -> None:
    torch.manual_seed(0)
    model, x, y = Noisy().double(), torch.randn(11, 6, dtype=torch.float64), torch.randint(3, (11,))
    plain = stepped(model, x, y, schedule=schedule)
    again = stepped(model, x, y, schedule=schedule, recompute=True)
    assert torch.equal(plain[0], again[0])
    for kept, own in zip(plain[1:], again[1:]):
        assert kept.keys() == own.keys()
        assert all(torch.equal(kept[name], own[name]) for name in kept)


def test_only_the_inputs_are_kept_until_the_backward() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)))
    module = _Named(layers)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        results = recomputed(module, module.forward, Seed(), 0, [x])
    assert kept == [x.numel()]
    results["y"].sum().backward()
    again = x.grad.clone()
    x.grad = None
    layers(x).sum().backward()
    assert torch.equal(x.grad, again)


class _Named(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.inner(x)}


class _Writes(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x.add_(1.0)}


def test_a_stage_that_changes_its_input_is_refused() -> None:
    with pytest.raises(StageError, match=r"(?s)changes one of its inputs in place.*recompute=False"):
        recomputed(writes := _Writes(), writes.forward, Seed(), 0, [torch.zeros(3)])
