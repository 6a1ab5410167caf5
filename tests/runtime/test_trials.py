"""Trials: steps in turn on a clock of their own, and real workers that leave the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.partitioner import choice
from stagecut.runtime import trials


class Clock:
    """A clock that only steps move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: list[int] = []

    def perf_counter(self) -> float:
        return self.now

    def step(self, index: int, seconds: Iterator[float]) -> trials.Step:
        def take() -> None:
            self.steps.append(index)
            self.now += next(seconds)

        return take


def forever(*seconds: float) -> Iterator[float]:
    while True:
        yield from seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(trials, "time", made)
    return made


def test_steps_are_taken_in_turn_and_one_that_is_always_faster_ends_the_trial(clock: Clock) -> None:
    trial = trials.try_steps([clock.step(0, forever(3.0)), clock.step(1, forever(2.0))], 1000.0)
    assert trial == trials.Trial((3.0, 2.0), 4)
    assert clock.steps == [0, 1] + 2 * [0, 0, 0, 1, 1, 1]
    assert clock.steps.count(0) == trials.LEAST_STEPS


def test_contenders_that_overlap_are_tried_until_the_time_is_over(clock: Clock) -> None:
    steps = [clock.step(0, forever(3.0, 1.0, 2.0)), clock.step(1, forever(2.5, 1.5, 3.5))]
    assert trials.try_steps(steps, 1000.0).n_steps == 16
    clock.now = 0.0
    found = trials.try_steps(steps, 45.0)
    assert found.n_steps == 6
    assert clock.now <= 45.0


def test_a_stall_of_one_step_decides_nothing(clock: Clock) -> None:
    stalled = clock.step(0, iter([1.0, 1.0, 9.0, 1.0] + 40 * [1.0]))
    trial = trials.try_steps([stalled, clock.step(1, forever(1.2))], 1000.0)
    assert trial.step_s == pytest.approx((1.0, 1.2))


class Net(nn.Module):
    """Running statistics and random numbers, which trials must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def all_are_close(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choice, "_WORTH_TRYING", 1e9)
    monkeypatch.setenv("STAGECUT_CACHE", str(tmp_path))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 6, dtype=torch.float64, generator=generator), torch.arange(8) % 3


def net() -> Net:
    torch.manual_seed(5)
    return Net().double()


@pytest.mark.usefixtures("all_are_close")
def test_plans_are_tried_on_real_workers_and_leave_no_trace() -> None:
    x, y = batch()
    model = net()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = copy.deepcopy(model.state_dict())
    before = torch.get_rng_state()
    with stagecut.compile(
        model, ["cpu", "cpu"], loss_fn=F.cross_entropy, example_inputs=(x,), example_target=y, trial_s=60.0
    ) as pm:
        assert torch.equal(torch.get_rng_state(), before)
        told = pm.plan.reasons[0]
        assert told.startswith("tried, as predictions are too close to tell: ")
        for shape in ("one device", "data parallel on 2 devices", "2 stages"):
            assert shape in told
        assert "steps each)" in told
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
        pm.zero_grad()
        pm.step(x, target=y)
        assert pm.verify(x, target=y).worst <= 1e-10
        assert pm.plan.alternatives


@pytest.mark.usefixtures("all_are_close")
def test_random_numbers_are_those_of_a_pipeline_that_tried_nothing() -> None:
    x, y = batch()
    plan: stagecut.Plan | None = None
    losses = []
    for trial_s in (60.0, 0.0):
        torch.manual_seed(11)
        with stagecut.compile(net(), ["cpu", "cpu"], loss_fn=F.cross_entropy, trial_s=trial_s, plan=plan) as pm:
            losses.append(pm.step(x, target=y).loss.item())
            plan = pm.plan
            assert plan.reasons[0].startswith("tried")
    assert losses[0] == losses[1]


def broken(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    raise ArithmeticError("this loss cannot be computed")


@pytest.mark.usefixtures("all_are_close")
def test_without_a_target_nothing_is_tried_and_the_step_fails_as_it_would_have() -> None:
    x, y = batch()
    with stagecut.compile(net(), ["cpu", "cpu"], loss_fn=broken, example_inputs=(x,)) as pm:
        assert any("this call is no training step" in line for line in pm.plan.reasons)
        with pytest.raises(ArithmeticError, match="this loss cannot be computed"):
            pm.step(x, target=y)


@pytest.mark.usefixtures("all_are_close")
def test_plans_that_cannot_be_tried_are_named_and_predictions_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()

    def fails(*args: object) -> None:
        raise ArithmeticError("not now")

    monkeypatch.setattr("stagecut.building.try_steps", fails)
    example = {"example_inputs": (x,), "example_target": y}
    one_op = nn.Linear(6, 3).double()
    with pytest.warns(UserWarning, match="plans could not be tried.*ArithmeticError: not now"):
        pm = stagecut.compile(one_op, ["cpu", "cpu"], loss_fn=F.cross_entropy, **example)
    with pm:
        assert "not tried: ArithmeticError: not now" in pm.plan.reasons
        assert pm.step(x, target=y).loss > 0


@pytest.mark.usefixtures("all_are_close")
@pytest.mark.parametrize(
    ("name", "value", "what"),
    [("free_memory_bytes", lambda: 1, "GiB, more than is free"), ("LEAST_STEPS", 10**9, r"and trial_s is 20")],
)
def test_what_trials_would_need_is_said_where_it_is_too_much(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, what: str
) -> None:
    monkeypatch.setattr(f"stagecut.building.{name}", value)
    x, y = batch()
    with stagecut.compile(net(), ["cpu", "cpu"], loss_fn=F.cross_entropy, example_inputs=(x,), example_target=y) as pm:
        told = [line for line in pm.plan.reasons if line.startswith("not tried, though predictions are too close")]
        assert len(told) == 1
        assert what in told[0]


@pytest.mark.usefixtures("all_are_close")
def test_where_time_is_short_the_slowest_as_predicted_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    tried: list[int] = []

    def two(steps: list[trials.Step], *rest: object) -> trials.Trial:
        tried.append(len(steps))
        return trials.Trial((1.0,) * len(steps), 4)

    monkeypatch.setattr("stagecut.building.try_steps", two)
    monkeypatch.setattr("stagecut.building._least_s", lambda contenders: 15.0 * (len(contenders) - 1))
    with stagecut.compile(net(), ["cpu", "cpu"], loss_fn=F.cross_entropy, example_inputs=(x,), example_target=y):
        assert tried == [2]


def test_a_negative_time_for_trials_is_refused() -> None:
    with pytest.raises(stagecut.ConstraintError, match="trial_s must be 0 seconds or more, got -1"):
        stagecut.compile(net(), ["cpu"], loss_fn=F.cross_entropy, trial_s=-1)
