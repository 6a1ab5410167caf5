"""What a training script does beside steps, on accelerators: lost workers, checkpoints, moving plans, randomness."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("no_workers_left"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Noisy(nn.Module):
    """Dropout as a module and as a function, BatchNorm with its running statistics, a constant of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.4)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)
        self.table = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)  # no buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.relu(self.norm(self.first(x))))
        x = self.middle(x) * self.table
        return self.last(F.dropout(x, 0.2, training=self.training))


X, Y = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def compiled(devices: Any, **options: Any) -> stagecut.Pipeline:
    torch.manual_seed(3)
    options = {"microbatches": 4, "schedule": "1f1b", "costs": "analytic", "timeout_s": 60, **options}
    return stagecut.compile(Noisy().double(), devices, loss_fn=F.cross_entropy, **options)


def losses_of(pm: stagecut.Pipeline, n_steps: int = 3) -> list[float]:
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
    losses = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        losses.append(pm.step(X, target=Y).loss.item())
        optimizer.step()
    return losses


def state_of(pm: stagecut.Pipeline) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in pm.state_dict().items()}


def test_randomness_and_statistics_do_not_depend_on_the_cut(pair: tuple[str, str], is_simulated: bool) -> None:
    whole = ["cpu"] if is_simulated else [pair[0]]  # accelerators have random numbers of their own
    with compiled(whole) as pm:
        wanted, state = losses_of(pm), state_of(pm)
    for devices in ([pair[0]], [[pair[0]], [pair[1]]]):
        with compiled(devices) as pm:
            assert losses_of(pm) == pytest.approx(wanted, rel=1e-10)
            for name, value in state_of(pm).items():
                torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("batchnorm", ["microbatch", "deferred", "sync"])
def test_statistics_over_replicas(pair: tuple[str, str], batchnorm: str) -> None:
    def states(devices: Any) -> dict[str, torch.Tensor]:
        with compiled(devices, batchnorm=batchnorm, microbatches=2) as pm:
            pm.model.drop.p = 0.0
            pm.eval().train()
            pm.model.norm.momentum = 0.5
            pm.step(X, target=Y)
            return state_of(pm)

    on_cpus, on_both = states([["cpu", "cpu"]] * 2), states([[pair[0], "cpu"], [pair[1], pair[0]]])
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        torch.testing.assert_close(on_both[name], on_cpus[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_killed_costs_a_step_and_no_number(pair: tuple[str, str], victim: int) -> None:
    devices = [[pair[0]], ["cpu"]]
    with compiled(devices) as pm:
        wanted = losses_of(pm, 4)
        state = state_of(pm)
    with compiled(devices) as pm:
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
        losses = []
        for step in range(4):
            optimizer.zero_grad()
            if step == 2:
                os.kill(pm.stats().workers[victim].pid, signal.SIGKILL)
            losses.append(pm.step(X, target=Y).loss.item())
            optimizer.step()
        assert pm.stats().n_restarts == 1
        assert losses == wanted
        for name, value in state_of(pm).items():
            assert torch.equal(value, state[name]), name


def test_a_checkpoint_goes_on_elsewhere(pair: tuple[str, str], tmp_path: Path) -> None:
    with compiled([[pair[0]], [pair[1]]]) as pm:
        optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
        for _ in range(2):
            pm.step(X, target=Y)
            optimizer.step()
        pm.save(tmp_path, step=2, optimizer=optimizer)
        torch.manual_seed(9)
        wanted = pm.step(X, target=Y).loss
    for devices in ([["cpu"], [pair[0]]], ["cpu", "cpu"]):
        with compiled(devices) as pm:
            pm.step(X, target=Y)
            optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
            pm.load(tmp_path, optimizer=optimizer)
            torch.manual_seed(9)
            torch.testing.assert_close(pm.step(X, target=Y).loss, wanted, rtol=1e-10, atol=0)
            optimizer.step()


def test_the_model_comes_back_whole(pair: tuple[str, str]) -> None:
    torch.manual_seed(3)
    model = Noisy().double()
    parameters = list(model.parameters())
    with stagecut.compile(model, [[pair[0]], [pair[1]]], loss_fn=F.cross_entropy, costs="analytic") as pm:
        pm.step(X, target=Y)
        assert {str(parameter.device) for parameter in model.parameters()} == {*pair}
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert all(parameter.grad.device.type == "cpu" for parameter in parameters)
    model(X)
    with stagecut.compile(model, [[pair[1]], ["cpu"]], loss_fn=F.cross_entropy, costs="analytic") as pm:
        pm.step(X, target=Y)  # captured once more


def test_what_the_user_passes_may_be_anywhere(pair: tuple[str, str]) -> None:
    with compiled([[pair[0]], ["cpu"]]) as pm:
        torch.manual_seed(1)
        wanted = pm.step(X, target=Y).loss
        torch.manual_seed(1)
        assert torch.equal(pm.step(X.to(pair[1]), target=Y.to(pair[0])).loss, wanted)
        pm.eval()
        elsewhere = pm.evaluate(X.to(pair[1])).output
        assert str(elsewhere.device) == pair[1]
        assert torch.equal(elsewhere.cpu(), pm.evaluate(X).output)
        pm.train()
        pm.zero_grad()
        given = X.to(pair[1])
        torch.manual_seed(1)
        F.cross_entropy(pm(given), Y.to(pair[1])).backward()
        by_hand = [parameter.grad.cpu().clone() for parameter in pm.parameters()]
        pm.zero_grad()
        torch.manual_seed(1)
        pm.step(X, target=Y)
        for parameter, gradient in zip(pm.parameters(), by_hand):
            torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-9, atol=1e-12)


def test_a_plan_may_move(pair: tuple[str, str]) -> None:
    with compiled([pair[0], "cpu"]) as pm:
        before = state_of(pm)
        pm.step(X, target=Y)
        pm.replan(X, target=Y, steps=1, gain=0.0)
        pm.step(X, target=Y)
        for name, parameter in pm.model.named_parameters():
            assert torch.equal(parameter.detach().cpu(), before[name]), name


def test_models_of_the_meta_device_get_their_memory_where_they_run(pair: tuple[str, str]) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with stagecut.compile(
        model, [[pair[0]], [pair[1]]], loss_fn=F.cross_entropy, costs="analytic", weights="init"
    ) as pm:
        pm.step(X, target=Y)
        assert pm.verify(X, target=Y).ok
        assert {str(parameter.device) for parameter in model.parameters()} == {*pair}


def test_nothing_is_warned_of_on_a_machine_with_several_accelerators(pair: tuple[str, str]) -> None:
    with compiled([pair[0], pair[1]], example_inputs=(X,)) as pm, warnings.catch_warnings():
        warnings.simplefilter("error")
        before = torch.get_rng_state()
        pm.step(X, target=Y)
        pm.verify(X, target=Y)
        pm.restart()
        pm.prepare(X)
        assert not torch.equal(before, torch.get_rng_state()), "a step draws its seed"


def test_what_is_asked_of_the_workers(pair: tuple[str, str]) -> None:
    with compiled([[pair[0]], ["cpu"]]) as pm:
        losses_of(pm)
        first, second = pm.stats().workers
        assert (first.device, second.device) == (pair[0], "cpu")
        assert first.memory_bytes
        assert first.pid != second.pid


def test_copies_of_the_pipelines_model_are_plain(pair: tuple[str, str]) -> None:
    with compiled([[pair[0]], [pair[1]]]) as pm:
        pm.step(X, target=Y)
        average = copy.deepcopy(pm.to_module())
        with torch.no_grad():
            for own, other in zip(average.parameters(), pm.parameters()):
                own.lerp_(other.to(own.device), 0.5)
        average(X)
