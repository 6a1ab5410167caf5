"""Whatever ends the parent ends the workers: Ctrl-C, SIGKILL, a normal exit without close()."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell has it ignored
import torch, stagecut
from torch import nn
class Slow(nn.Module):
    def forward(self, x):
        if bool((x.detach() > 1000).any()):
            import threading
            print("inside", flush=True)
            threading.Event().wait()
        return x
model = nn.Sequential(nn.Linear(4, 4), Slow(), nn.Linear(4, 2))
pm = stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=nn.functional.cross_entropy, costs="analytic")
x, y = torch.rand(8, 4), torch.zeros(8, dtype=torch.long)
pm.step(x, target=y)
print("ready", flush=True)
if sys.argv[1] == "wait":
    with torch.no_grad():
        model[0].weight.fill_(1e5)
    pm.step(x, target=y)
"""
GONE_S = 60.0


def start(mode: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    workers = psutil.Process(process.pid).children()
    if mode == "wait":
        assert process.stdout.readline().strip() == "inside"
    return process, workers


def assert_gone(workers: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(workers, timeout=GONE_S)
    for worker in alive:
        worker.kill()
    assert alive == []


def test_ctrl_c_raises_keyboard_interrupt_and_ends_the_workers() -> None:
    process, workers = start("wait")
    assert len(workers) == 3  # two, and the process that they were forked from
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=GONE_S)
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0
    assert_gone(workers)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_takes_its_workers_along(how: signal.Signals) -> None:
    process, workers = start("wait")
    assert len(workers) == 3  # two, and the process that they were forked from
    process.send_signal(how)
    process.communicate(timeout=GONE_S)
    assert_gone(workers)


def test_a_script_that_ends_without_close_leaves_nothing() -> None:
    process, workers = start("end")
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert_gone(workers)


def test_nothing_stays_in_the_temporary_folder(tmp_path: Path) -> None:
    script = SCRIPT + "\npm.close()\n"
    done = subprocess.run(
        [sys.executable, "-c", script, "end"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("stagecut")] == []
