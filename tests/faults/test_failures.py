"""A failure in a worker reaches the caller as itself, soon, with its place, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.runtime import launch

pytestmark = [pytest.mark.usefixtures("no_workers_left"), pytest.mark.filterwarnings("ignore::UserWarning")]
SOON_S = 5.0
POISON = 1313.0


class OddInputError(Exception):
    """An exception of the user's own, with an argument."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} is odd")
        self.row = row


class Unpicklable(Exception):
    """An exception that cannot be sent."""

    def __init__(self) -> None:
        super().__init__("cannot travel")
        self.lock = threading.Lock()


class Trap(nn.Module):
    """Does what ``kind`` says when it meets a poisoned row, and only then."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x.detach() > 1000).any()):
            if self.kind == "raise":
                raise OddInputError(7)
            if self.kind == "unpicklable":
                raise Unpicklable
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "exit":
                os._exit(0)
            if self.kind == "hang":
                threading.Event().wait()
        return x


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        nn.init.eye_(self.first.weight)
        nn.init.zeros_(self.first.bias)
        self.inner = nn.ModuleDict({"trap": Trap(kind)})
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner["trap"](self.first(x)))


def pipeline(kind: str, timeout_s: float | None = 60.0) -> stagecut.Pipeline:
    torch.manual_seed(0)
    return stagecut.compile(
        Model(kind),
        [["cpu"], ["cpu"]],
        loss_fn=F.cross_entropy,
        microbatches=4,
        schedule="1f1b",
        costs="analytic",
        timeout_s=timeout_s,
        on_worker_lost="raise",
    )


def batch(*, poisoned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    if poisoned:
        x[5, 0] = POISON
    return x, torch.zeros(8, dtype=torch.long)


@pytest.fixture
def workers() -> Iterator[list[psutil.Process]]:
    """Collect this test's worker processes, and check at the end that all are gone."""
    stagecut.end_workers()  # of tests before, which wait for the next pipeline
    found: list[psutil.Process] = []
    yield found
    assert [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


@dataclass
class Failure:
    """A pipeline that failed, the error, and the seconds that it took to arrive."""

    pipeline: stagecut.Pipeline
    error: BaseException
    seconds: float

    @property
    def trapped_stage(self) -> int:
        return self.pipeline.plan.stage_of["inner_trap"]


def fail(kind: str, workers: list[psutil.Process], error: type[BaseException], timeout_s: float = 60.0) -> Failure:
    """Take a good step, then a poisoned one that must raise ``error`` within five seconds.

    The machine itself may stall for seconds, so the bound has to be met in one of three attempts.
    """
    for _ in range(3):
        failure = attempt(kind, workers, error, timeout_s)
        if failure.seconds < SOON_S:
            return failure
        failure.pipeline.close()
    raise AssertionError(f"the error took {failure.seconds:.1f} s in the last of three attempts")


def attempt(kind: str, workers: list[psutil.Process], error: type[BaseException], timeout_s: float) -> Failure:
    pm = pipeline(kind, timeout_s)
    x, y = batch(poisoned=False)
    try:
        pm.step(x, target=y)
    except stagecut.StallError as stalled:  # the machine stood still for longer than a short timeout
        return Failure(pm, stalled, float("inf"))
    templates = [template.pid for template in launch._templates]
    own = [p for p in psutil.Process().children() if p not in workers and p.pid not in templates]
    assert len(own) == 2
    workers += own
    x, y = batch(poisoned=True)
    start = time.monotonic()
    with pytest.raises(error) as caught:
        pm.step(x, target=y)
    return Failure(pm, caught.value, time.monotonic() - start)


def test_an_exception_arrives_as_itself_with_stage_microbatch_and_module(workers: list[psutil.Process]) -> None:
    failure = fail("raise", workers, OddInputError)
    assert isinstance(failure.error, OddInputError)
    assert failure.error.row == 7
    assert str(failure.error) == "row 7 is odd"
    site = failure.error.stagecut  # type: ignore[attr-defined]
    assert (site.stage, site.microbatch, site.module_path) == (failure.trapped_stage, 2, "inner.trap")
    assert any("worker's traceback" in note for note in failure.error.__notes__)


def test_after_an_error_the_pipeline_says_so_and_restart_mends_it(workers: list[psutil.Process]) -> None:
    pm = fail("raise", workers, OddInputError).pipeline
    x, y = batch(poisoned=False)
    with pytest.raises(stagecut.StageError, match="broken by an earlier error: OddInputError: row 7 is odd"):
        pm.step(x, target=y)
    pm.restart()
    pm.zero_grad()
    assert pm.verify(x, target=y).ok
    pm.close()


def test_an_exception_that_cannot_be_pickled_arrives_as_text(workers: list[psutil.Process]) -> None:
    assert "Unpicklable: cannot travel" in str(fail("unpicklable", workers, stagecut.StageError).error)


def lost_bytes(pm: stagecut.Pipeline, lost: stagecut.WorkerLost) -> int:
    """Return what the plan is for, on the worker that was lost."""
    assert lost.worker is not None
    return int(pm.plan.worker_bytes[lost.worker])


@pytest.mark.parametrize(("kind", "words"), [("kill", "killed by SIGKILL"), ("exit", "exit code 0")])
def test_a_worker_that_ends_is_named(workers: list[psutil.Process], kind: str, words: str) -> None:
    failure = fail(kind, workers, stagecut.WorkerLost)
    assert f"worker {failure.trapped_stage} " in str(failure.error)
    assert words in str(failure.error)
    lost = failure.error
    assert isinstance(lost, stagecut.WorkerLost)
    assert (lost.stage, lost.replica, lost.microbatch, lost.step) == (failure.trapped_stage, 0, 2, 2)
    assert (lost.signal, lost.exit_code) == ((signal.SIGKILL, None) if kind == "kill" else (None, 0))
    assert (kind == "kill") == (f"memory_bytes={lost_bytes(failure.pipeline, lost) // 2}" in str(lost))


def test_a_hang_ends_at_the_timeout_and_says_who_waits_where(workers: list[psutil.Process]) -> None:
    failure = fail("hang", workers, stagecut.StallError, timeout_s=4.0)
    assert failure.seconds >= 4.0
    stage = failure.trapped_stage
    assert f"worker {stage} is at F(stage {stage}, microbatch 2)" in str(failure.error)
    assert isinstance(failure.error, stagecut.StallError)
    busy, *waiting = sorted(failure.error.waiting, key=lambda each: len(each.waits_for))
    assert (busy.worker, busy.waits_for) == (stage, ())
    assert all(stage in each.waits_for for each in waiting)
    assert "in forward" in busy.stack
    assert "threading.py" in busy.stack


def raising_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("no loss today")


def test_an_exception_in_the_loss_names_the_last_stage(workers: list[psutil.Process]) -> None:
    with stagecut.compile(
        Model("none"), [["cpu"], ["cpu"]], loss_fn=raising_loss, microbatches=2, costs="analytic"
    ) as pm:
        x, y = batch(poisoned=False)
        with pytest.raises(ZeroDivisionError, match="no loss today") as caught:
            pm.step(x, target=y)
        assert caught.value.stagecut.stage == 1  # type: ignore[attr-defined]


def test_an_exception_in_an_optimizers_hook_is_the_callers_and_breaks_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x, y = batch(poisoned=False)
    with stagecut.compile(
        model, [["cpu"], ["cpu"]], loss_fn=F.cross_entropy, microbatches=2, costs="analytic", launch="inline"
    ) as pm:
        optimizer = torch.optim.SGD(pm.parameters(), 0.1)

        def hook(*_: object) -> None:
            raise OddInputError(3)

        handle = optimizer.register_step_pre_hook(hook)
        pm.step(x, target=y)
        with pytest.raises(OddInputError, match="row 3 is odd"):
            optimizer.step()
        handle.remove()
        optimizer.step()
        pm.zero_grad()
        assert pm.verify(x, target=y).ok


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.guard = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.detach().sum()) > 0 else x


def test_what_cannot_be_sent_to_a_worker_is_named(workers: list[psutil.Process]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Locked(), nn.Linear(4, 2))
    with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=F.cross_entropy, costs="analytic") as pm:
        x, y = batch(poisoned=False)
        with pytest.raises(
            stagecut.StageError, match=r"module '1', attribute 'guard' \(lock\), cannot be sent to a worker"
        ):
            pm.step(x, target=y)


def test_a_lambda_loss_and_a_local_class_work() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if float(x.detach().sum()) > -1e9 else x

    model = nn.Sequential(Local(), nn.Linear(4, 2))
    with stagecut.compile(
        model, [["cpu"], ["cpu"]], loss_fn=lambda out, y: F.cross_entropy(out, y), costs="analytic"
    ) as pm:
        x, y = batch(poisoned=False)
        assert pm.verify(x, target=y).ok


def test_wrong_arguments_are_refused_before_anything_is_sent() -> None:
    with pipeline("none") as pm:
        x, y = batch(poisoned=False)
        pm.step(x, target=y)
        with pytest.raises(stagecut.ShapeError, match="the batch has no rows"):
            pm.step(x[:0], target=y[:0])
        with pytest.raises(stagecut.ShapeError, match="requires a gradient"):
            pm.step(x.clone().requires_grad_(), target=y)
        pm.zero_grad()
        assert pm.verify(x, target=y).ok, "the pipeline is still whole"


def test_a_parameter_that_changes_its_shape_is_refused() -> None:
    with pipeline("none") as pm:
        x, y = batch(poisoned=False)
        pm.step(x, target=y)
        pm.model.last.bias.data = torch.zeros(3)
        with pytest.raises(stagecut.StageError, match=r"last\.bias was torch\.float32 \(2,\)"):
            pm.step(x, target=y)
