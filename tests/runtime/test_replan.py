"""Planning again with what was measured: moving when it pays, and training on as if nothing had happened."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import stagecut
from stagecut.errors import ConstraintError, StagecutError, StageError
from stagecut.partitioner.capture import capture
from stagecut.partitioner.configurations import Wishes
from stagecut.partitioner.describe import describe
from stagecut.partitioner.planner import make_plan
from stagecut.partitioner.replan import stage_seconds
from stagecut.runtime.program import Span, Timeline

ROWS, WIDTH, DEPTH = 128, 512, 6


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


def plan_of(model: nn.Module, first: int) -> stagecut.Plan:
    """Two stages, ``first`` ops on the first one."""
    x, _ = batch(0)
    captured = capture(model, (x,), {})
    names = [node.name for node in captured.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    stage_of = {name: int(index >= first) for index, name in enumerate(names)}
    wishes = Wishes(n_microbatches=2, schedule="1f1b", costs="analytic", assignment=stage_of)
    return make_plan(captured, [x], describe([["cpu"], ["cpu"]]), wishes)


class Twins:
    """A pipeline and a plain copy of its model, trained side by side."""

    def __init__(self, plan: stagecut.Plan | None, launch: str, devices: object = (["cpu"], ["cpu"]), **wishes: object):
        self.model = make_model()
        self.plain = copy.deepcopy(self.model)
        self.pm = stagecut.compile(
            self.model, list(devices), loss_fn=nn.functional.mse_loss, plan=plan, launch=launch, **wishes
        )  # type: ignore[arg-type]
        self.optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (self.pm, self.plain)]

    def train(self, step: int) -> None:
        """Take a step on both, and compare."""
        x, y = batch(step)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        given = self.pm.step(x, target=y).loss
        wanted = nn.functional.mse_loss(self.plain(x), y)
        wanted.backward()
        torch.testing.assert_close(given, wanted.detach(), rtol=1e-12, atol=0)
        for (name, own), other in zip(self.model.named_parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-14, msg=name)
        for optimizer in self.optimizers:
            optimizer.step()


@pytest.mark.parametrize("launch", ["inline", "local"])
def test_a_wrong_cut_is_moved_and_training_goes_on_exactly(launch: str) -> None:
    twins = Twins(plan_of(make_model(), 2 * DEPTH - 1), launch)
    with twins.pm as pm:
        for step in range(3):
            twins.train(step)
        before = pm.plan
        parameters = [(id(p), p.data_ptr(), p.detach().clone()) for p in pm.parameters()]
        gradients = [(id(p.grad), p.grad.clone()) for p in pm.parameters()]
        states = [id(state["exp_avg"]) for state in twins.optimizers[0].state.values()]
        x, y = batch(7)
        after = pm.replan(x, target=y, steps=3)
        assert after is pm.plan
        assert after is not before
        assert 3 <= sum(stage == 0 for stage in after.stage_of.values()) <= 2 * DEPTH - 3
        for p, (identity, _, value), (grad_identity, gradient) in zip(pm.parameters(), parameters, gradients):
            assert id(p) == identity
            assert torch.equal(p, value)
            assert id(p.grad) == grad_identity
            assert torch.equal(p.grad, gradient)
        assert [id(state["exp_avg"]) for state in twins.optimizers[0].state.values()] == states
        for step in range(3, 6):
            twins.train(step)


def test_a_plan_that_no_other_beats_by_enough_stays() -> None:
    twins = Twins(plan_of(make_model(), DEPTH), "inline")
    with twins.pm as pm:
        twins.train(0)
        before, engine = pm.plan, pm._engine
        x, y = batch(7)
        assert pm.replan(x, target=y, steps=2, gain=0.9) is before
        assert pm._engine is engine
        twins.train(1)


def test_the_plan_of_the_planner_itself_stays() -> None:
    """Replanning under the costs that the plan was made for: stages that take longer are scaled, and so are rivals."""
    twins = Twins(None, "inline", microbatches=2)
    with twins.pm as pm:
        twins.train(0)
        before = pm.plan
        x, y = batch(7)
        assert pm.replan(x, target=y, steps=2, gain=0.5) is before


def test_replanning_before_the_first_step_plans_first() -> None:
    twins = Twins(plan_of(make_model(), 1), "inline")
    with twins.pm as pm:
        x, y = batch(7)
        pm.replan(x, target=y, steps=1)
        assert all(p.grad is None for p in pm.parameters())
        twins.train(0)


def test_no_steps_and_a_closed_pipeline_are_refused() -> None:
    twins = Twins(plan_of(make_model(), 1), "inline")
    x, y = batch(7)
    with twins.pm as pm, pytest.raises(ConstraintError, match="steps must be at least 1, got 0"):
        pm.replan(x, target=y, steps=0)
    with pytest.raises(StageError, match="this pipeline is closed"):
        twins.pm.replan(x, target=y)


def test_under_torchrun_it_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(plan_of(make_model(), 1), "inline")
    with twins.pm as pm:
        twins.train(0)
        monkeypatch.setattr(pm._build, "launch", "torchrun")
        monkeypatch.setattr(pm, "profile", lambda *args, **kwargs: pytest.fail("nothing is measured in vain"))
        x, y = batch(7)
        with pytest.raises(StagecutError, match=r"every rank owns its stage's weights.*\n.*state_dict"):
            pm.replan(x, target=y)
        twins.train(1)


def test_backwards_in_two_parts_count_as_what_they_would_take_in_one() -> None:
    """They were left out, so that a profile under a zero-bubble schedule corrected forwards only."""
    spans = [
        Span(0, "F", 0, 0, 0.0, 1.0),
        Span(0, "I", 0, 0, 1.0, 2.1),
        Span(0, "W", 0, 0, 2.1, 3.2),
        Span(0, "F", 1, 0, 3.2, 4.2),
        Span(0, "B", 1, 0, 4.2, 6.3),
    ]
    found = stage_seconds(Timeline("measured", 1, tuple(spans)), action_s=0.1, split=1.25)
    assert found[0] == (pytest.approx(0.9), pytest.approx((1.0 + 1.0) / 1.25))
    assert found[1] == (pytest.approx(0.9), pytest.approx(2.0))
