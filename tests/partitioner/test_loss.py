"""The loss is priced like the model, and belongs to the last stage of the plan."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.partitioner.analysis import analyse
from stagecut.partitioner.loss import Loss, LossCall
from tests.support.score_plan import score_plan

WIDTH, ROWS = 16, 8


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def planned(loss_fn: Any, target: Any, net: nn.Module | None = None, **options: Any) -> stagecut.Plan:
    return stagecut.plan(
        model() if net is None else net,
        ["cpu", "cpu"],
        example_inputs=(torch.randn(ROWS, 4),),
        loss_fn=loss_fn,
        example_target=target,
        costs="analytic",
        **{"stages": 2, "replicas": 1, "microbatches": 2, **options},
    )


def slow_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    wide = output @ torch.ones(WIDTH, 4096)
    return F.mse_loss(wide @ torch.ones(4096, WIDTH), target)


def test_the_last_stage_takes_as_much_longer_as_the_loss_and_the_plan_adds_up() -> None:
    target = torch.randn(ROWS, WIDTH)
    without, with_loss = planned(None, None), planned(F.mse_loss, target)
    assert without.timing.loss_s == (0.0, 0.0)
    forward_s, backward_s = with_loss.timing.loss_s
    assert forward_s > 0 < backward_s
    last = [op for op in with_loss.ops if op.stage == 1]
    assert with_loss.stages[-1].forward_s == pytest.approx(sum(op.forward_s for op in last) + forward_s)
    assert with_loss.stages[-1].backward_s == pytest.approx(sum(op.backward_s for op in last) + backward_s)
    assert not score_plan(with_loss).faults


def test_a_loss_that_takes_long_moves_the_cut() -> None:
    target = torch.randn(ROWS, WIDTH)
    layers = nn.Sequential(nn.Linear(4, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(11)))
    cheap, slow = planned(F.mse_loss, target, layers), planned(slow_loss, target, layers)
    assert slow.timing.loss_s[0] > 10 * cheap.timing.loss_s[0]
    on_last = [sum(op.stage == 1 for op in plan.ops) for plan in (cheap, slow)]
    assert on_last[1] < on_last[0]
    assert not score_plan(slow).faults


def test_the_loss_is_not_computed_again_where_a_stage_is() -> None:
    plan = planned(slow_loss, torch.randn(ROWS, WIDTH), recompute=True)
    assert plan.stages[-1].recompute
    assert not score_plan(plan).faults


def test_results_and_targets_may_be_nested() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model()

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            h = self.body(x)
            return {"first": h, "both": (h, h * 2)}

    def loss_fn(output: dict[str, Any], target: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.mse_loss(output["both"][1], target["a"]) + F.cross_entropy(output["first"], target["b"])

    target = {"a": torch.randn(ROWS, WIDTH), "b": torch.zeros(ROWS, dtype=torch.long)}
    assert planned(loss_fn, target, Two()).timing.loss_s[1] > 0


def test_a_loss_that_cannot_be_priced_is_left_out_with_a_warning() -> None:
    def refuses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise ValueError("not with these")

    with pytest.warns(UserWarning, match="the loss cannot be priced by itself .*not with these"):
        plan = planned(refuses, torch.randn(ROWS, WIDTH))
    assert plan.timing.loss_s == (0.0, 0.0)


def test_the_first_step_prices_the_loss_with_its_own_target() -> None:
    net, x, y = model(), torch.randn(ROWS, 4), torch.randn(ROWS, WIDTH)
    options: Any = {"costs": "analytic", "launch": "inline", "stages": 2, "replicas": 1, "microbatches": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with stagecut.compile(copy.deepcopy(net), ["cpu", "cpu"], loss_fn=F.mse_loss, **options) as pm:
            pm.step(x, target=y)
            assert pm.plan.timing.loss_s == planned(F.mse_loss, y, net).timing.loss_s
        with stagecut.compile(net, ["cpu", "cpu"], loss_fn=F.mse_loss, example_inputs=(x,), **options) as pm:
            assert pm.plan.timing.loss_s == (0.0, 0.0), "nobody said what the loss compares with"


def call_of(function: Any) -> LossCall:
    captured = stagecut.capture(model(), (torch.randn(ROWS, 4),))
    facts = analyse(captured, [torch.randn(ROWS, 4)], ROWS)
    return LossCall(Loss(function, torch.randn(ROWS, WIDTH), ROWS), captured.trained, facts, ROWS)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def extra_repr(self) -> str:
        return f"{self.factor}"

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.factor * F.mse_loss(output, target)


def scaled(factor: float) -> Any:
    return lambda output, target: factor * F.mse_loss(output, target)


def test_only_equal_losses_share_what_was_measured() -> None:
    losses: list[Any] = [
        lambda output, target: F.mse_loss(output, target),
        lambda output, target: F.l1_loss(output, target),
        lambda output, target: F.l1_loss(output, target) * 2,
        lambda output, target: F.l1_loss(output, target) * 3,
        scaled(2.0),
        scaled(3.0),
        Scaled(2.0),
        Scaled(3.0),
        partial(F.huber_loss, delta=1.0),
        partial(F.huber_loss, delta=2.0),
        F.mse_loss,
        nn.MSELoss(),
    ]
    signatures = [call_of(loss).signature("cpu") for loss in losses]
    assert len(set(signatures)) == len(losses)
    again = [call_of(loss).signature("cpu") for loss in (F.mse_loss, nn.MSELoss(), scaled(2.0), Scaled(2.0))]
    assert again == [signatures[i] for i in (10, 11, 4, 6)]
