"""A local worker that is lost costs one step: others do it again, and every number is that of an undisturbed run."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from fault_rows.injector import Injector, Watched, batch, fired

import stagecut
from stagecut.runtime.local import LocalEngine

pytestmark = pytest.mark.usefixtures("no_workers_left")
STEPS, DISTURBED = 5, 3
SPLIT, REPLICATED = [["cpu"], ["cpu"]], [["cpu", "cpu"], ["cpu"]]


def compiled(injector: Injector, devices: Any = SPLIT, **options: Any) -> stagecut.Pipeline:
    torch.manual_seed(0)
    model = Watched(injector).double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*kept whole")
        return stagecut.compile(
            model,
            devices,
            loss_fn=F.mse_loss,
            microbatches=4 if devices is SPLIT else 2,
            schedule="1f1b",
            costs="analytic",
            threads_per_worker=1,
            example_inputs=(batch(0)[0],),
            **options,
        )


def train(pm: stagecut.Pipeline, *, kill_idle: bool = False) -> dict[str, torch.Tensor]:
    """Train by :meth:`step`, and one call each of what else there is; returns every number that comes of it."""
    optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
    torch.manual_seed(7)
    numbers: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        if kill_idle and step == DISTURBED:
            assert isinstance(pm._engine, LocalEngine)
            os.kill(pm._engine.pool.workers[0].process.pid, signal.SIGKILL)
        x, y = batch(step, marked=step == DISTURBED)
        numbers[f"loss {step}"] = pm.step(x, target=y).loss
        optimizer.step()
        optimizer.zero_grad()
    return {**numbers, **{name: value.detach().clone() for name, value in pm.state_dict().items()}}


def assert_equal(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(given[name], value), name


@pytest.mark.parametrize(
    ("kind", "backward", "devices", "words"),
    [
        ("kill", False, SPLIT, r"killed by SIGKILL, in step 4, at F\(stage \d, microbatch 2\)"),
        ("exit", True, SPLIT, r"exit code 0, in step 4, at B\(stage \d, microbatch 2\)"),
        ("crash", True, REPLICATED, "killed by SIGSEGV, in step 4"),
        ("kill", False, REPLICATED, "killed by SIGKILL, in step 4"),
    ],
)
def test_a_step_that_lost_a_worker_is_done_again_with_the_same_numbers(
    kind: str, backward: bool, devices: Any, words: str, tmp_path: Path
) -> None:
    with compiled(Injector(kind, tmp_path, times=0, backward=backward), devices) as pm:
        wanted = train(pm)
    with compiled(Injector(kind, tmp_path, backward=backward), devices) as pm:
        with pytest.warns(UserWarning, match=words):
            given = train(pm)
        assert pm.stats().n_restarts == 1
    assert fired(tmp_path) == 1
    assert_equal(given, wanted)


def test_a_worker_that_was_killed_between_steps_is_replaced(tmp_path: Path) -> None:
    with compiled(Injector("kill", tmp_path, times=0)) as pm:
        wanted = train(pm)
    with compiled(Injector("kill", tmp_path, times=0)) as pm, pytest.warns(UserWarning, match="killed by SIGKILL"):
        assert_equal(train(pm, kill_idle=True), wanted)


def forward_and_backward(pm: stagecut.Pipeline) -> dict[str, torch.Tensor]:
    """Run two forwards, the second while the first's backward is to come; between them the modes change."""
    torch.manual_seed(7)
    (x, y), (u, v) = batch(0), batch(1, marked=True)
    early = pm(x)
    pm.eval()
    late = pm(u)
    pm.train()
    F.mse_loss(late, v).backward()
    F.mse_loss(early, y).backward()
    numbers = {f"gradient of {name}": p.grad.clone() for name, p in pm.named_parameters() if p.grad is not None}
    return {**numbers, "early": early.detach(), "late": late.detach(), **pm.state_dict()}


@pytest.mark.parametrize("backward", [False, True])
def test_forwards_whose_activations_are_gone_are_run_again(backward: bool, tmp_path: Path) -> None:
    with compiled(Injector("kill", tmp_path, times=0, backward=backward)) as pm:
        wanted = {name: value.clone() for name, value in forward_and_backward(pm).items()}
    with compiled(Injector("kill", tmp_path, backward=backward)) as pm:
        with pytest.warns(UserWarning, match="the step is done again"):
            given = forward_and_backward(pm)
        assert fired(tmp_path) == 1
        assert_equal(given, wanted)


def accumulated(pm: stagecut.Pipeline) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    with pm.no_sync():
        for step in range(2):
            x, y = batch(step, marked=step == 1)
            pm.step(x, target=y)
    x, y = batch(2)
    pm.step(x, target=y)
    return {name: p.grad.clone() for name, p in pm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("devices", [REPLICATED, [["cpu", "cpu"]]])
def test_gradients_that_no_replica_has_summed_survive(devices: Any, tmp_path: Path) -> None:
    with compiled(Injector("kill", tmp_path, times=0), devices) as pm:
        wanted = accumulated(pm)
    with compiled(Injector("kill", tmp_path), devices) as pm:
        with pytest.warns(UserWarning, match="the step is done again"):
            given = accumulated(pm)
        assert fired(tmp_path) == 1
        assert_equal(given, wanted)


def test_a_step_that_loses_workers_twice_is_given_up(tmp_path: Path) -> None:
    with compiled(Injector("kill", tmp_path, times=5)) as pm:
        x, y = batch(0, marked=True)
        with (
            pytest.warns(UserWarning, match="the step is done again"),
            pytest.raises(stagecut.WorkerLost, match="and so was the one before it, in the same step"),
        ):
            pm.step(x, target=y)
        assert fired(tmp_path) == 2
        pm.restart()
        x, y = batch(0)
        pm.zero_grad()
        assert pm.verify(x, target=y).ok


def test_a_crash_says_where_it_was(tmp_path: Path) -> None:
    with compiled(Injector("crash", tmp_path), on_worker_lost="raise") as pm:
        x, y = batch(0, marked=True)
        with pytest.raises(stagecut.WorkerLost, match="killed by SIGSEGV") as caught:
            pm.step(x, target=y)
    notes = "\n".join(caught.value.__notes__)
    assert "Fatal Python error: Segmentation fault" in notes
    assert "in fire" in notes


def test_a_stopped_worker_is_a_stall_and_is_ended(tmp_path: Path) -> None:
    with compiled(Injector("stop", tmp_path), timeout_s=3.0) as pm:
        x, y = batch(0, marked=True)
        with pytest.raises(stagecut.StallError, match=r"in step 1: .*and waits for worker") as caught:
            pm.step(x, target=y)
    (busy,) = [each for each in caught.value.waiting if not each.waits_for]
    assert "is stopped" in busy.stack


def test_memory_that_runs_out_is_set_against_the_plan(tmp_path: Path) -> None:
    with compiled(Injector("memory", tmp_path)) as pm:
        x, y = batch(0, marked=True)
        with pytest.raises(stagecut.OutOfMemoryError, match=r"memory ran out in step 1, .*the plan is for") as caught:
            pm.step(x, target=y)
        error = caught.value
        assert error.used_bytes is not None
        assert error.used_bytes > error.planned_bytes > 0
        assert f"memory_bytes={error.planned_bytes // 2}" in str(error)
        assert isinstance(error.__cause__, RuntimeError)
        site = error.stagecut  # type: ignore[attr-defined]
        assert (site.microbatch, site.module_path) == (2, "injector")


def test_weights_that_change_between_forward_and_backward_are_refused(tmp_path: Path) -> None:
    with compiled(Injector("none", tmp_path)) as pm:
        x, y = batch(0)
        loss = F.mse_loss(pm(x), y)
        with torch.no_grad():
            pm.model.middle.weight.mul_(0.5)  # type: ignore[union-attr, operator]
        with pytest.raises(stagecut.StageError, match=r"middle\.weight was changed between a forward and its backward"):
            loss.backward()
