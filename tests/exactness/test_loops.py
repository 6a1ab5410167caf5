"""The loops that users have, each beside the same loop on the unsplit model: equal weights at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import stagecut

STEPS = 5
Loop = Callable[[Any, Callable[[torch.Tensor, torch.Tensor, float], Any], nn.Module], None]


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(4))).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.arange(n) % 6) for n in (8, 8, 5, 8, 1)]


def clip_of(runs: Any) -> Callable[[float], Any]:
    own = getattr(runs, "clip_grad_norm_", None)
    return own if own is not None else lambda most: torch.nn.utils.clip_grad_norm_(runs.parameters(), most)


def adamw_with_schedule_and_clipping(runs: Any, backward: Any, model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(runs.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1)
    for x, y in batches():
        backward(x, y, 1.0)
        clip_of(runs)(0.1)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def accumulation_over_two_steps(runs: Any, backward: Any, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(runs.parameters(), 1e-1, momentum=0.9)
    for number, (x, y) in enumerate(batches()):
        backward(x, y, 0.5)
        if number % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()


def moving_averages(runs: Any, backward: Any, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(runs.parameters(), 1e-1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for x, y in batches():
        backward(x, y, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    with torch.no_grad():
        for parameter, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
            parameter.copy_(averaged)


def groups_that_are_frozen_and_freed(runs: Any, backward: Any, model: nn.Module) -> None:
    parameters = list(runs.parameters())
    optimizer = torch.optim.SGD([{"params": parameters[:4]}, {"params": parameters[4:], "lr": 1e-3}], 1e-1)
    for number, (x, y) in enumerate(batches()):
        for parameter in parameters[:4]:
            parameter.requires_grad_(number >= 2)
        backward(x, y, 1.0)
        optimizer.step()
        optimizer.zero_grad()


LOOPS: list[Loop] = [
    adamw_with_schedule_and_clipping,
    accumulation_over_two_steps,
    moving_averages,
    groups_that_are_frozen_and_freed,
]


@pytest.mark.parametrize(
    ("loop", "launch"),
    [*((loop, "inline") for loop in LOOPS), (adamw_with_schedule_and_clipping, "local"), (moving_averages, "local")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_loop_ends_with_the_weights_of_the_same_loop_on_the_unsplit_model(loop: Loop, launch: str) -> None:
    model = model_of()
    plain = copy.deepcopy(model)
    wishes = {"microbatches": 3, "schedule": "zb-h1", "costs": "analytic", "launch": launch}
    with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=F.cross_entropy, **wishes) as pm:

        def ours(x: torch.Tensor, y: torch.Tensor, share: float) -> None:
            if share == 1.0:
                pm.step(x, target=y)
            else:
                (share * F.cross_entropy(pm(x), y)).backward()

        loop(pm, ours, model)
    loop(plain, lambda x, y, share: (share * F.cross_entropy(plain(x), y)).backward(), plain)
    for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12, msg=name)


def test_a_gradient_scaler_drives_a_pipeline_as_it_does_a_model() -> None:
    """Scaled losses, unscaled gradients, and a step that is left out where a gradient is not finite."""
    model = model_of().float()
    plain = copy.deepcopy(model)
    with stagecut.compile(
        model, [["cpu"], ["cpu"]], loss_fn=F.cross_entropy, microbatches=2, schedule="1f1b", launch="inline"
    ) as pm:
        found = []
        for runs, forward in ((pm, pm), (plain, plain)):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
            optimizer = torch.optim.SGD(runs.parameters(), 1e-1)
            for number, (x, y) in enumerate(batches()[:4]):
                bad = number == 1
                loss = F.cross_entropy(forward(x.float()), y) * (float("inf") if bad else 1.0)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                clip_of(runs)(0.5)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            found.append(scaler.get_scale())
    assert found[0] == found[1]
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_a_norm_that_is_not_finite_can_be_an_error() -> None:
    model = model_of()
    with stagecut.compile(model, ["cpu"], loss_fn=F.cross_entropy, launch="inline", costs="analytic") as pm:
        x, y = batches()[0]
        pm.step(x * float("nan"), target=y)
        with pytest.raises(stagecut.StagecutError, match="norm of order 2 of all gradients is nan"):
            pm.clip_grad_norm_(1.0, error_if_nonfinite=True)
        with pytest.raises(stagecut.errors.ConstraintError, match="norm_type must be positive, got 0"):
            pm.clip_grad_norm_(1.0, 0)
