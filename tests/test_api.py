"""The public face: plans that are saved and run, limits, devices, loss weights, autocast."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def model(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)]
    return nn.Sequential(*layers).double()


def batch(rows: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 8, dtype=torch.float64, generator=generator), torch.arange(rows) % 3


def test_a_saved_plan_runs_as_it_stands(tmp_path: Path) -> None:
    x, y = batch()
    plan = stagecut.plan(
        model(), [["cpu"]] * 3, example_inputs=(x,), microbatches=2, schedule="fill-drain", costs="analytic"
    )
    plan.save(tmp_path / "plan.json")
    with stagecut.compile(
        model(), [["cpu"]] * 3, loss_fn=F.cross_entropy, plan=tmp_path / "plan.json", launch="inline"
    ) as pm:
        assert pm.verify(x, target=y).worst <= 1e-10
        assert pm.plan == plan == stagecut.load(tmp_path / "plan.json")


def test_a_plan_for_another_model_or_other_devices_is_refused() -> None:
    x, y = batch()
    plan = stagecut.plan(model(16), [["cpu"], ["cpu"]], example_inputs=(x,), costs="analytic")
    with (
        stagecut.compile(model(), [["cpu"], ["cpu"]], loss_fn=F.cross_entropy, plan=plan, launch="inline") as pm,
        pytest.raises(stagecut.PlanError, match="the plan was made for Sequential with graph"),
    ):
        pm.step(x, target=y)
    with pytest.raises(stagecut.ConstraintError, match="the plan is for devices"):
        stagecut.compile(model(16), [["cpu"]] * 3, loss_fn=F.cross_entropy, plan=plan, launch="inline")


def test_a_memory_limit_moves_the_cut_or_says_what_would_fit() -> None:
    x, _ = batch()
    wide = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8)).double()
    n_bytes = 4 * 8 * sum(parameter.numel() for parameter in wide.parameters())
    plan = stagecut.plan(wide, [["cpu"]] * 3, example_inputs=(x,), costs="analytic", memory_bytes=1.1 * n_bytes)
    assert len(plan.stages) > 1
    assert all(stage.memory_bytes <= 1.1 * n_bytes for stage in plan.stages)
    with pytest.raises(stagecut.InfeasibleError, match="stage"):
        stagecut.plan(wide, [["cpu"]] * 3, example_inputs=(x,), costs="analytic", memory_bytes=0.3 * n_bytes)


def test_a_described_cluster_is_planned_for_and_not_run_on() -> None:
    x, _ = batch()
    first, second = (stagecut.plan(model(), "sim:2xH100-80GB", example_inputs=(x,), stages=2) for _ in range(2))
    assert first == second
    assert first.devices == ("H100:0", "H100:1")
    with pytest.raises(stagecut.DeviceError, match="not run on"):
        stagecut.compile(model(), "sim:2xH100-80GB")


def test_the_plan_knows_when_one_device_is_faster() -> None:
    x, _ = batch()
    plan = stagecut.plan(model(), [["cpu"], ["cpu"]], example_inputs=(x,), costs="analytic")
    assert plan.prediction.one_device_s < plan.prediction.step_s


def test_more_stages_than_ops_is_refused() -> None:
    x, _ = batch()
    with pytest.raises(stagecut.InfeasibleError, match="9 stages were asked for"):
        stagecut.plan(model(), [["cpu"]] * 9, example_inputs=(x,), costs="analytic")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"devices": []}, stagecut.DeviceError, "devices is empty"),
        ({"devices": ["cpu"] * 3, "replicas": 2}, stagecut.DeviceError, "do not divide"),
        ({"devices": ["cuda:99"]}, stagecut.DeviceError, "not there"),
        ({"devices": ["nonsense"]}, stagecut.DeviceError, "is no device"),
        ({"devices": "ranks"}, stagecut.DeviceError, "those of torchrun's ranks, and launch='local' has none"),
        ({"devices": ["cpu"], "launch": "magic"}, stagecut.ConstraintError, "launch must be one of"),
        ({"devices": ["cpu"], "loss_reduction": "max"}, stagecut.ConstraintError, "loss_reduction must be"),
        ({"devices": ["cpu"], "shard": True}, stagecut.ConstraintError, "share one copy of the parameters already"),
        (
            {"devices": ["cpu"], "launch": "torchrun", "shard": True, "compile_stages": True},
            stagecut.ConstraintError,
            "shard=True and compile_stages were both given",
        ),
        (
            {"devices": ["cpu"], "gradient_accumulation_fusion": True, "compile_stages": True},
            stagecut.ConstraintError,
            "gradient_accumulation_fusion was given, and compile_stages leaves the backward to torch.compile",
        ),
        (
            {"devices": ["cpu"], "gradient_accumulation_fusion": True, "recompute": True},
            stagecut.ConstraintError,
            "gradient_accumulation_fusion was given, and recompute=True leaves the backward to autograd",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        stagecut.compile(model(), **options)  # type: ignore[arg-type]


def gradients_of_whole_batch(loss_fn: object, y: torch.Tensor) -> list[torch.Tensor | None]:
    plain = model()
    assert callable(loss_fn)
    loss_fn(plain(batch()[0]), y).backward()
    return [parameter.grad for parameter in plain.parameters()]


def masked(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, ignore_index=-1)


def summed(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, reduction="sum")


def test_a_loss_weight_makes_ignored_targets_exact() -> None:
    x, y = batch()
    y = torch.where(torch.arange(10) < 4, -1, y)
    options = {"microbatches": 3, "launch": "inline", "costs": "analytic"}
    with stagecut.compile(
        model(), [["cpu"], ["cpu"]], loss_fn=masked, loss_weight=lambda target: int((target >= 0).sum()), **options
    ) as pm:
        # The first microbatch has no target at all: its mean is not a number, and its weight is 0.
        assert torch.isfinite(pm.step(x, target=y).loss)
        for parameter, expected in zip(pm.parameters(), gradients_of_whole_batch(masked, y)):
            torch.testing.assert_close(parameter.grad, expected)


def test_a_summed_loss_is_summed() -> None:
    x, y = batch()
    with stagecut.compile(
        model(),
        [["cpu"], ["cpu"]],
        loss_fn=summed,
        loss_reduction="sum",
        microbatches=3,
        launch="inline",
        costs="analytic",
    ) as pm:
        pm.step(x, target=y)
        for parameter, expected in zip(pm.parameters(), gradients_of_whole_batch(summed, y)):
            torch.testing.assert_close(parameter.grad, expected)


def test_autocast_of_the_caller_reaches_the_stages() -> None:
    x, y = batch()
    single = copy.deepcopy(model()).float()
    with (
        stagecut.compile(
            single, [["cpu"], ["cpu"]], loss_fn=F.cross_entropy, microbatches=2, launch="inline", costs="analytic"
        ) as pm,
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        assert pm.evaluate(x.float()).output.dtype is torch.bfloat16
        assert pm.verify(x.float(), target=y).ok


def test_the_first_call_may_be_an_evaluation_without_gradients() -> None:
    x, y = batch()
    with stagecut.compile(
        model(), [["cpu"], ["cpu"]], loss_fn=F.cross_entropy, launch="inline", costs="analytic"
    ) as pm:
        with torch.no_grad():
            pm(x)
        assert pm.verify(x, target=y).ok


def test_plain_leaves_before_tensors_in_a_result_keep_their_gradients() -> None:
    class Results(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> dict[str, object]:
            hidden = self.a(x)
            return {"constant": 3, "nothing": None, "y": self.b(hidden), "hidden": hidden}

    torch.manual_seed(0)
    plain = Results().double()
    x, _ = batch()
    with stagecut.compile(
        copy.deepcopy(plain), [["cpu"], ["cpu"]], microbatches=2, launch="inline", costs="analytic"
    ) as pm:
        for forward in (pm, plain):
            result = forward(x)
            (result["y"].pow(2).mean() + result["hidden"].sum()).backward()
        for given, expected in zip(pm.parameters(), plain.parameters()):
            torch.testing.assert_close(given.grad, expected.grad)


def test_planning_draws_no_random_numbers_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGECUT_CACHE", str(tmp_path))  # so that the dropout is measured, by running it
    x, _ = batch()
    random = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3)).double()
    before = torch.get_rng_state()
    stagecut.plan(random, ["cpu"], example_inputs=(x,))
    with stagecut.compile(random, ["cpu"], loss_fn=F.cross_entropy, example_inputs=(x,), launch="inline"):
        assert torch.equal(torch.get_rng_state(), before)


def test_a_plan_looks_at_all_objects_of_the_process_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For caches that runs of the model may fill: it takes a tenth of a second, and was done a dozen times."""
    calls: list[int] = []
    real = gc.get_objects

    def counted(*arguments: Any) -> list[Any]:
        calls.append(1)
        return real(*arguments)

    options: dict[str, Any] = {"example_inputs": (batch()[0],), "costs": "analytic", "stages": 2}
    stagecut.plan(model(), ["cpu", "cpu"], **options)  # what is imported along the way is imported now
    monkeypatch.setattr(gc, "get_objects", counted)
    for n in (1, 2):  # a cache that was made in between is found
        stagecut.plan(model(), ["cpu", "cpu"], **options)
        assert len(calls) == n
