"""Accumulation over several steps with one reduction, and what a user may do in the middle of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut

pytestmark = [pytest.mark.usefixtures("no_workers_left"), pytest.mark.filterwarnings("ignore::UserWarning")]


class Tied(nn.Module):
    """The first and the last op share a weight; a frozen weight and an unused one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.unused = nn.Linear(2, 2)
        self.middle[0].weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.shared(self.middle(self.shared(x)))
        return result


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)) for _ in range(n)]


def expected(model: nn.Module, of: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor | None]:
    plain = copy.deepcopy(model)
    plain.zero_grad()
    for x, y in of:
        F.mse_loss(plain(x), y).backward()
    return {name: parameter.grad for name, parameter in plain.named_parameters()}


def check(model: nn.Module, wanted: dict[str, torch.Tensor | None]) -> None:
    for name, parameter in model.named_parameters():
        if wanted[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-10, atol=1e-14, msg=name)


@pytest.fixture(scope="module", params=[[["cpu"], ["cpu"]], [["cpu", "cpu"]], [["cpu", "cpu"], ["cpu"]]], ids=str)
def pm(request: pytest.FixtureRequest) -> Iterator[stagecut.Pipeline]:
    torch.manual_seed(0)
    model = Tied().double()
    options = {"microbatches": 2, "schedule": "1f1b", "costs": "analytic", "threads_per_worker": 1}
    with stagecut.compile(model, request.param, loss_fn=F.mse_loss, **options) as pipeline:
        yield pipeline


def test_steps_under_no_sync_and_the_next_one_add_up(pm: stagecut.Pipeline) -> None:
    three = batches(3)
    for _ in range(2):  # a second time with gradients of before to add to
        with pm.no_sync():
            for x, y in three[:2]:
                pm.step(x, target=y)
        pm.evaluate(three[0][0])  # changes nothing
        pm.step(three[2][0], target=three[2][1])
    wanted = expected(pm.model, three + three)
    check(pm.model, wanted)
    pm.zero_grad()
    pm.step(three[0][0], target=three[0][1])
    check(pm.model, expected(pm.model, three[:1]))
    pm.zero_grad()


def test_the_other_loop_accumulates_too(pm: stagecut.Pipeline) -> None:
    (x, y), (x2, y2) = batches(2)
    with pm.no_sync():
        loss = F.mse_loss(pm(x), y)
        loss.backward()
    F.mse_loss(pm(x2), y2).backward()
    check(pm.model, expected(pm.model, [(x, y), (x2, y2)]))
    pm.zero_grad()


def test_zero_grad_drops_what_was_accumulated(pm: stagecut.Pipeline) -> None:
    (x, y), (x2, y2) = batches(2)
    with pm.no_sync():
        pm.step(x, target=y)
        assert pm.model.get_parameter("shared.weight").grad is not None
    pm.zero_grad()
    pm.step(x2, target=y2)
    check(pm.model, expected(pm.model, [(x2, y2)]))
    pm.zero_grad()


def test_values_that_change_in_the_middle_are_refused(pm: stagecut.Pipeline) -> None:
    ((x, y),) = batches(1)
    with pm.no_sync():
        pm.step(x, target=y)
    gradient = pm.model.get_parameter("shared.weight").grad
    assert gradient is not None
    gradient.mul_(2)
    with pytest.raises(stagecut.StageError, match=r"shared\.weight was changed between steps under no_sync"):
        pm.step(x, target=y)
    with pytest.raises(stagecut.StagecutError, match=r"verify\(\) between steps under no_sync would lose"):
        pm.verify(x, target=y)
    pm.zero_grad()
    pm.step(x, target=y)
    check(pm.model, expected(pm.model, [(x, y)]))
    with pm.no_sync():
        assert pm.verify(x, target=y).worst <= 1e-10, "its own step sums"
    pm.zero_grad()


def test_parts_that_nobody_will_sum_do_not_pass_for_gradients() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    ((x, y),) = batches(1)
    options = {"microbatches": 2, "schedule": "1f1b", "costs": "analytic", "threads_per_worker": 1}
    with stagecut.compile(model, [["cpu", "cpu"]], loss_fn=F.mse_loss, **options) as pm:
        with pm.no_sync():
            pm.step(x, target=y)
        with pytest.warns(UserWarning, match="gradients of 5 parameters .* were never summed, and are dropped"):
            pm.restart()
        assert all(parameter.grad is None for parameter in pm.parameters())
        pm.step(x, target=y)
        check(pm.model, expected(pm.model, [(x, y)]))
