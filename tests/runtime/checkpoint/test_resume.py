"""Training that goes on by itself: one script starts, and starts again from the newest whole checkpoint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchrun_resume
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.errors import CheckpointError
from stagecut.runtime.checkpoint.peers import Alone
from stagecut.runtime.checkpoint.reading import has_checkpoints

TIMEOUT_S = 240


def test_a_killed_rank_under_torchrun_costs_no_bit(repository: Path, tmp_path: Path) -> None:
    script, result = str(repository / "tests" / "support" / "torchrun_resume.py"), tmp_path / "result.pt"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    command = [sys.executable, *torchrun, script, str(tmp_path / "checkpoints"), "5", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    begun = re.findall(r"restart (\d): goes on from step (\d)", done.stdout)
    # The checkpoint of step 5 was being written, and may have been whole already.
    assert begun in ([("0", "0")] * 2 + [("1", step)] * 2 for step in "45"), done.stdout
    # Rank 0 says so, unless torchrun, which looks ten times a second, ends it before it could.
    assert "WorkerLost: rank 0 lost another rank" in done.stderr or "closing signal SIGTERM" in done.stderr, done.stderr
    resumed = torch.load(result, weights_only=True)
    undisturbed = torchrun_resume.train(tmp_path / "undisturbed", ["cpu", "cpu"], 0)
    assert resumed["losses"] == undisturbed["losses"]
    assert resumed["state"].keys() == undisturbed["state"].keys()
    assert all(torch.equal(resumed["state"][name], tensor) for name, tensor in undisturbed["state"].items())


def compiled() -> stagecut.Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return stagecut.compile(model, ["cpu"], loss_fn=F.mse_loss, launch="inline", costs="analytic")


def test_nothing_is_changed_where_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    pm = compiled()
    before = {name: tensor.clone() for name, tensor in pm.state_dict().items()}
    optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
    generator = torch.get_rng_state()
    for folder in (tmp_path / "not there", tmp_path):
        loaded = pm.resume(folder, optimizer=optimizer)
        assert (loaded.step, loaded.path, loaded.data, loaded.passed_over) == (0, None, None, ())
    assert all(torch.equal(before[name], tensor) for name, tensor in pm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not optimizer.state


def test_the_newest_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    pm = compiled()
    for step in (3, 4):
        pm.save(tmp_path, step, data=step)
    loaded = compiled().resume(tmp_path)
    assert (loaded.step, loaded.path, loaded.data) == (4, tmp_path / "step-00000004", 4)


def test_checkpoints_of_which_none_is_whole_are_no_reason_to_begin_again(tmp_path: Path) -> None:
    pm = compiled()
    path = pm.save(tmp_path, 3).wait()
    (path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        compiled().resume(tmp_path)


def test_one_checkpoint_that_is_asked_for_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-00000007.*No such file"):
        compiled().resume(tmp_path / "step-00000007")


def test_a_file_is_no_folder_of_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"plan\.json is a file, and checkpoints are in a folder"):
        compiled().resume(tmp_path / "plan.json")


class Elsewhere(Alone):
    """Another rank, to which the folder has checkpoints."""

    def gather(self, mine: bytes) -> list[bytes]:
        return [mine, b"+1"]


def test_a_folder_that_rank_0_does_not_share_is_no_new_beginning(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank 1 sees checkpoints in .*, and rank 0 sees none\n.*all machines"):
        has_checkpoints(tmp_path, Elsewhere())
