"""``gradient_accumulation_fusion``: products that add to gradients, exact but for rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.runtime.sinks import Accumulate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(24, 24), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(24, 5)).double()


@pytest.mark.parametrize("wishes", [{"schedule": "1f1b"}, {"schedule": "zb-h1"}, {"replicas": 2}], ids=str)
@pytest.mark.parametrize("launch", ["local", "inline"])
def test_gradients_are_those_of_the_unsplit_model(wishes: dict[str, Any], launch: str) -> None:
    plain, split = model(), model()
    devices = ["cpu"] * 2 if "replicas" in wishes else [["cpu"], ["cpu"]]
    with stagecut.compile(
        split,
        devices,
        loss_fn=F.mse_loss,
        microbatches=3,
        costs="analytic",
        launch=launch,
        threads_per_worker=1,
        gradient_accumulation_fusion=True,
        **wishes,
    ) as pm:
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (plain, pm)]
        for step in range(5):
            torch.manual_seed(step)
            x, y = torch.randn(12 + step, 24).double(), torch.randn(12 + step, 5).double()  # ragged too
            expected = F.mse_loss(plain(x), y)
            expected.backward()
            for _ in range(2):  # a second backward adds to the first
                found = pm.step(x, target=y)
            F.mse_loss(plain(x), y).backward()
            torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-12, atol=0)
            for ours, theirs in zip(split.parameters(), plain.parameters()):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def test_products_are_fused_where_it_is_asked_for_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    monkeypatch.setattr(
        Accumulate, "add_sums", lambda self, index, *given: (added.append(index), self.add(index, torch.mv(*given)))
    )
    x, y = torch.randn(12, 24).double(), torch.randn(12, 5).double()
    for fuses in (False, True):
        pm = stagecut.compile(
            copy.deepcopy(model()),
            [["cpu"], ["cpu"]],
            loss_fn=F.mse_loss,
            schedule="zb-h1",  # recorded in the first step
            microbatches=3,
            costs="analytic",
            launch="inline",
            gradient_accumulation_fusion=fuses,
        )
        with pm:
            pm.step(x, target=y)
        assert len(added) == (3 * 5 if fuses else 0)  # five biases, three microbatches
