"""Workers are forked from a process that has imported what they need, and are as if they had been started alone."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

import stagecut
from stagecut.runtime import launch
from stagecut.runtime.forking import can_fork

pytestmark = [
    pytest.mark.skipif(not can_fork(), reason="workers are forked on Linux"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def _new_workers() -> Iterator[None]:
    stagecut.end_workers()
    yield
    stagecut.end_workers()


class Draws(nn.Module):
    """Says what the process that runs it is like: numbers beside what the model computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import numpy as np

        told = [
            np.random.rand(),
            float(os.environ.get("STAGECUT_TEST_NUMBER", "0")),
            float(len(os.sched_getaffinity(0))),
        ]
        return x.sum() * 0 + torch.tensor(told, dtype=x.dtype)


class Sampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.draws = Draws()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), self.draws(x).expand(len(x), 3)


def started(n_workers: int = 2) -> launch.WorkerPool:
    pool = launch.WorkerPool(n_workers, 1)
    pool.wait_until_ready(120)
    return pool


def template() -> psutil.Process:
    (found,) = launch._templates
    return psutil.Process(found.pid)


def test_workers_are_children_of_this_process_with_the_memory_of_one_import() -> None:
    pool = started(3)
    begin = time.perf_counter()
    later = started(1)
    fork_s = time.perf_counter() - begin
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    assert fork_s < time.perf_counter() - begin
    workers = [psutil.Process(worker.process.pid) for worker in (*pool.workers, *later.workers)]
    assert {worker.ppid() for worker in workers} == {os.getpid()}
    assert all(os.getsid(worker.pid) == worker.pid for worker in workers)
    shares = [worker.memory_full_info() for worker in workers]
    assert all(share.uss < share.rss / 2 for share in shares)
    assert template().num_threads() == 1
    pool.kill()
    later.kill()
    assert not any(worker.is_running() for worker in workers)
    assert template().is_running()


def test_they_draw_different_numbers_and_have_the_surroundings_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(number: str) -> list[float]:
        monkeypatch.setenv("STAGECUT_TEST_NUMBER", number)
        model = Sampler()
        with stagecut.compile(model, ["cpu"], opaque=["draws"], costs="analytic", microbatches=1) as pm:
            return pm.evaluate(torch.ones(1, 2)).output[1][0].tolist()

    first = told("1")
    before = template().pid
    pool, launch._parked[:] = list(launch._parked), []
    second = told("2")
    launch._parked.extend(pool)
    assert template().pid == before
    assert first[0] != second[0]
    assert (first[1], second[1]) == (1.0, 2.0)
    assert first[2] == len(os.sched_getaffinity(0))


def test_what_is_read_when_torch_is_imported_makes_a_new_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started().kill()
    before = template()
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    started().kill()
    assert template().pid != before.pid
    assert not before.is_running()


def test_one_serves_the_planning_and_what_comes_after_it() -> None:
    script = """
    import warnings
    import torch, stagecut
    from stagecut.runtime import launch
    warnings.simplefilter("ignore")
    seen = []
    start = launch.Template
    launch.Template = lambda *arguments: seen.append(start(*arguments)) or seen[-1]
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    with stagecut.compile(model, ["cpu", "cpu"], loss_fn=torch.nn.functional.mse_loss) as pm:
        for _ in range(3):
            pm.step(torch.ones(4, 4), target=torch.ones(4, 4))
    assert len(seen) == 1, seen
    """
    # Torch sets this one itself when the planning imports Dynamo.
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)


class Imports(nn.Module):
    """Says how many modules the process that runs it has imported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0 + len(sys.modules)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.imports = Imports()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), self.imports(x)


def test_nothing_that_takes_long_is_imported_in_a_step() -> None:
    def loss(output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return (output[0] - target).square().mean()

    x = torch.ones(2, 2)
    options = {"loss_fn": loss, "opaque": ["imports"], "costs": "analytic", "microbatches": 1}
    with stagecut.compile(Counting(), ["cpu"], **options) as pm:
        before = pm.evaluate(x).output[1][0, 0].item()
        for _ in range(4):
            pm.step(x, target=x)
        after = pm.evaluate(x).output[1][0, 0].item()
    assert before > 1000
    assert after - before < 20


def test_taking_over_the_usual_settings_imports_no_compiler() -> None:
    script = """
    import sys
    from stagecut.runtime.surroundings import Surroundings
    Surroundings.here().take_over()
    assert "torch._inductor" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_a_template_that_was_killed_is_replaced_and_its_workers_go_on() -> None:
    pool = started()
    os.kill(template().pid, signal.SIGKILL)
    template().wait(10)
    other = started(1)
    assert all(worker.process.poll() is None for worker in (*pool.workers, *other.workers))
    pool.kill()
    other.kill()


@pytest.mark.parametrize(
    ("before", "obstacle"),
    [
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start(); ",
            "has threads",
        ),
        ("import torch; torch.cuda._is_in_bad_fork = lambda: True; ", "has asked CUDA for its devices"),
    ],
)
def test_where_forks_are_not_possible_workers_are_started_and_it_is_said(
    before: str, obstacle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "_BOOT", before + launch._BOOT)
    monkeypatch.setattr(launch, "_forks", True)
    with caplog.at_level(logging.WARNING, "stagecut"):
        pool = started(2)
    assert all(isinstance(worker.process, subprocess.Popen) for worker in pool.workers)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"a worker is started by itself, which takes longer: the process that workers are forked from {obstacle}"
    )
    pool.kill()


@pytest.mark.parametrize("is_ready", [False, True])
def test_one_that_was_never_asked_leaves_without_a_word(is_ready: bool, capfd: pytest.CaptureFixture[str]) -> None:
    template = launch._template()
    if is_ready:
        assert select.select([template._channel], [], [], 120)[0], "it says so, which nobody reads"
    template._channel.close()
    assert template._process.wait(120) == 0
    assert capfd.readouterr().err == ""


def test_all_of_them_leave_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from stagecut.runtime import launch
        pool = launch.WorkerPool(2, 1)
        pool.wait_until_ready(120)
        child = os.fork()  # holds the other end of every pipe and socket
        if child == 0:
            time.sleep(600)
        print(child, launch._templates[0].pid, *(worker.process.pid for worker in pool.workers), flush=True)
        time.sleep(600)
        """)
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child, *others = (psutil.Process(int(pid)) for pid in process.stdout.readline().split())
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(others, timeout=10)
    child.kill()
    process.stdout.close()
    assert alive == []
