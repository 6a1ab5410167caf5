"""Faults inside of a step: workers that are lost or stand still, exceptions, memory, arguments that do not fit."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import stagecut

from .injector import InjectedError, Injector, Watched, batch, fired
from .outcome import Outcome, Row, seconds_since

STALL_S = 3.0
_STEPS, _DISTURBED = 5, 2
_Numbers = dict[str, torch.Tensor]


def compiled(injector: Injector, devices: Any = (["cpu"], ["cpu"]), **options: Any) -> stagecut.Pipeline:
    """Compile the model that has all that a step can change."""
    torch.manual_seed(0)
    microbatches = 4 if all(len(stage) == 1 for stage in devices) else 2
    settings = {"loss_fn": F.mse_loss, "microbatches": microbatches, "schedule": "1f1b", "costs": "analytic", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stagecut.compile(
            Watched(injector).double(),
            list(devices),
            threads_per_worker=1,
            example_inputs=(batch(0)[0],),
            **settings,
        )


def trained(
    pm: stagecut.Pipeline, seen: Callable[[Exception], None], after: Callable[[int], None] = lambda step: None
) -> _Numbers:
    """Train; a step that fails is told to ``seen`` and done again after a restart, one that is done to ``after``."""
    optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
    numbers: _Numbers = {}
    for step in range(_STEPS):
        x, y = batch(step, marked=step == _DISTURBED)
        for attempt in range(2):
            torch.manual_seed(step)
            try:
                numbers[f"loss {step}"] = pm.step(x, target=y).loss
                break
            except Exception as error:
                if attempt:
                    raise
                seen(error)
                pm.restart()
        after(step)
        optimizer.step()
        optimizer.zero_grad()
    return {**numbers, **{name: value.detach().clone() for name, value in pm.state_dict().items()}}


def undisturbed(devices: Any, folder: Path) -> _Numbers:
    """Return the numbers of a run in which nothing happens."""
    with compiled(Injector("none", folder, times=0), devices) as pm:
        return trained(pm, _unexpected)


def _unexpected(error: Exception) -> None:
    raise error


def equal(given: _Numbers, wanted: _Numbers) -> bool:
    """Say whether two runs agree to the bit."""
    return given.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in given.items())


def in_a_step(kind: str, error: type[Exception], goal_s: float, **options: Any) -> Callable[[Path], Outcome]:
    """Make a row in which the step raises ``error``, and training goes on after ``pm.restart()``."""
    backward = options.pop("backward", False)
    devices = options.pop("devices", (["cpu"], ["cpu"]))

    def run(folder: Path) -> Outcome:
        wanted = undisturbed(devices, folder)
        found = Outcome(0, "nothing", goal_s=goal_s)

        def seen(caught: Exception) -> None:
            found.seconds = seconds_since(folder / "fired-0")
            found.seen = type(caught).__name__ if isinstance(caught, error) else f"{type(caught).__name__}: {caught}"

        with compiled(Injector(kind, folder, backward=backward), devices, **options) as pm:
            found.equal = equal(trained(pm, seen), wanted)
        found.fired = fired(folder) if found.seen == error.__name__ else 0
        return found

    return run


def replaced(kind: str, goal_s: float, **options: Any) -> Callable[[Path], Outcome]:
    """Make a row in which the step does not fail: the worker is replaced. Seconds are until the step is done again."""
    backward = options.pop("backward", False)
    devices = options.pop("devices", (["cpu"], ["cpu"]))

    def run(folder: Path) -> Outcome:
        wanted = undisturbed(devices, folder)
        found = Outcome(0, "a warning", goal_s=goal_s)

        def done(step: int) -> None:
            if step == _DISTURBED:
                found.seconds = seconds_since(folder / "fired-0")

        injector = Injector(kind, folder, backward=backward)
        with warnings.catch_warnings(record=True) as told, compiled(injector, devices) as pm:
            warnings.simplefilter("always")
            found.equal = equal(trained(pm, _unexpected, done), wanted)
        found.fired = fired(folder) if any("done again" in str(one.message) for one in told) else 0
        return found

    return run


def between_steps(folder: Path) -> Outcome:
    """Kill an idle worker."""
    wanted = undisturbed((["cpu"], ["cpu"]), folder)
    with warnings.catch_warnings(), compiled(Injector("none", folder, times=0)) as pm:
        warnings.simplefilter("ignore")
        os.kill(pm._engine.pool.workers[0].process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        numbers = trained(pm, _unexpected)
        return Outcome(pm.stats().n_restarts, "a warning", equal=equal(numbers, wanted))


def arguments(folder: Path) -> Outcome:
    """Give a pipeline in the middle of training what it does not take; it goes on as if nothing had been."""
    wanted = undisturbed((["cpu"], ["cpu"]), folder)
    n_refused = 0
    with compiled(Injector("none", folder, times=0)) as pm:
        x, y = batch(0)
        for args, kwargs in (
            ((x[:, :5],), {"target": y}),
            ((x.float(),), {"target": y}),
            ((x, x), {"target": y}),
            ((x,), {"target": y, "mask": x}),
            ((x[:0],), {"target": y[:0]}),
            ((), {"target": y}),
            (("x",), {"target": y}),
        ):
            try:
                pm.step(*args, **kwargs)  # type: ignore[arg-type]
            except (stagecut.ShapeError, TypeError):
                n_refused += 1
        return Outcome(
            int(n_refused == 7), f"ShapeError, {n_refused} of 7", equal=equal(trained(pm, _unexpected), wanted)
        )


ROWS = [
    Row("kill -9 of a worker in a forward", replaced("kill", 30.0)),
    Row(
        "kill -9 in a backward, two replicas", replaced("kill", 30.0, backward=True, devices=(["cpu", "cpu"], ["cpu"]))
    ),
    Row("kill -9 between steps", between_steps),
    Row("worker exits 0 too early", replaced("exit", 30.0)),
    Row('kill -9, on_worker_lost="raise"', in_a_step("kill", stagecut.WorkerLost, 1.0, on_worker_lost="raise")),
    Row("crash (SIGSEGV), raised", in_a_step("crash", stagecut.WorkerLost, 1.0, on_worker_lost="raise")),
    Row("SIGSTOP", in_a_step("stop", stagecut.StallError, STALL_S + 1, timeout_s=STALL_S)),
    Row("deadlock in user code", in_a_step("hang", stagecut.StallError, STALL_S + 1, timeout_s=STALL_S)),
    Row("exception in a forward", in_a_step("raise", InjectedError, 1.0)),
    Row("exception in a backward", in_a_step("raise", InjectedError, 1.0, backward=True)),
    Row("out of memory (allocator)", in_a_step("memory", stagecut.OutOfMemoryError, 1.0)),
    Row("wrong shape, dtype, arity, keyword, empty", arguments),
]
