"""Local workers wait for the next pipeline of their process, and are as new for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

import stagecut
from stagecut.runtime import launch
from stagecut.runtime.local import LocalEngine

pytestmark = [pytest.mark.usefixtures("no_workers_left"), pytest.mark.filterwarnings("ignore::UserWarning")]


class Making(nn.Module):
    """Makes a tensor of the default dtype, and says where relative paths lead."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(2) * len(os.getcwd())


def used(devices: list[list[str]], model: nn.Module | None = None) -> tuple[list[int], torch.Tensor]:
    """Run a step on local workers; return their process ids and the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)) if model is None else model
    x = torch.ones(4, 4)
    options = {"costs": "analytic", "threads_per_worker": 1, "microbatches": 2}
    with stagecut.compile(model, devices, loss_fn=nn.functional.mse_loss, **options) as pm:
        loss = pm.step(x, target=torch.zeros(4, 2)).loss
        assert isinstance(pm._engine, LocalEngine)
        assert pm.startup.total_s > 0
        return [worker.process.pid for worker in pm._engine.pool.workers], loss


def test_the_next_pipeline_gets_the_workers_of_the_last_one() -> None:
    stagecut.end_workers()
    first, loss = used([["cpu"], ["cpu"]])
    second, same = used([["cpu"], ["cpu"]])
    assert sorted(first) == sorted(second)
    assert torch.equal(loss, same)
    replicas, _ = used([["cpu", "cpu"]])  # these have a process group, and do so again
    again, _ = used([["cpu", "cpu"], ["cpu"]])
    assert sorted(replicas) == sorted(first)
    assert set(first) < set(again)
    fewer, _ = used([["cpu"]])
    assert set(fewer) < set(again)
    stagecut.end_workers()
    assert not any(psutil.pid_exists(pid) for pid in again)
    fresh, _ = used([["cpu"]])
    assert not set(fresh) & set(again)


def test_a_worker_that_died_while_it_waited_is_replaced() -> None:
    (first,), _ = used([["cpu"]])
    worker = psutil.Process(first)
    worker.kill()
    psutil.wait_procs([worker])
    (second,), _ = used([["cpu"]])
    assert second != first


def test_a_worker_that_nobody_wants_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "IDLE_S", 0.2)
    (first,), _ = used([["cpu"]])
    psutil.wait_procs([psutil.Process(first)], timeout=30)
    (second,), _ = used([["cpu"]])
    assert second != first


def test_what_surrounds_the_model_is_the_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 2), Making()).double()
    x = torch.ones(4, 4, dtype=torch.float64)
    before, _ = used([["cpu"]])
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        with stagecut.compile(model, ["cpu"], launch="local", opaque=["1"], costs="analytic") as pm:
            result = pm.evaluate(x).output
            assert isinstance(pm._engine, LocalEngine)
            assert [worker.process.pid for worker in pm._engine.pool.workers] == before
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(result, model(x.float().double()).detach())
    assert result.dtype is torch.float64


SCRIPT = """
import importlib, os, sys, warnings
warnings.simplefilter("ignore")
import torch, stagecut
from pathlib import Path
from torch import nn
def pids(pm): return [w.process.pid for w in pm._engine.pool.workers]
def run(module):
    with stagecut.compile(module.Scale(), ["cpu"], opaque=[""], costs="analytic") as pm:
        return pm.evaluate(torch.ones(2, 2)).output[0, 0].item(), pids(pm)
import edited
one, first = run(edited)
import other  # which the waiting worker knows nothing of
assert run(edited)[1] == first
path = Path(edited.__file__)
with stagecut.compile(edited.Scale(), ["cpu"], opaque=[""], costs="analytic") as pm:
    pm.evaluate(torch.ones(2, 2))
    assert pids(pm) == first
    path.write_text(path.read_text().replace("* 2", "* 3"))  # while a worker is at work that has read it
    os.utime(path, (1, 1))
two, second = run(importlib.reload(edited))
assert (one, two) == (2.0, 3.0), (one, two)
assert first != second
child = os.fork()
if child == 0:
    _, third = run(edited)
    os._exit(0 if third != second else 1)
assert os.waitpid(child, 0)[1] == 0
assert run(edited)[1] == second, "the child left its parent's workers alone"
print("fine")
"""


def test_edited_modules_get_new_workers_and_forked_children_their_own(tmp_path: Path) -> None:
    (tmp_path / "edited.py").write_text(
        "from torch import nn\nclass Scale(nn.Module):\n    def forward(self, x):\n        return x * 2\n"
    )
    (tmp_path / "other.py").write_text("")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "fine", done.stderr
