"""Under torchrun, ranks that own stages, replicas and shared weights compute what the unsplit model computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 400


@pytest.mark.parametrize(
    ("devices", "n_ranks", "schedule", "machines"),
    [
        ("[['cpu', 'cpu'], ['cpu', 'cpu']]", 4, "1f1b", "one"),
        ("[['cpu'], ['cpu']]", 2, "interleaved-zero-bubble", "each its own"),
        ("[['cpu', 'cpu', 'cpu'], ['cpu']]", 4, "1f1b", "two"),  # the last stage has neighbours and others
        ("[['cpu', 'cpu'], ['cpu', 'cpu']]", 4, "zb-v", "one"),  # one worker has both ends of the tie
    ],
)
def test_ties_replicas_state_and_both_loops(
    repository: Path, devices: str, n_ranks: int, schedule: str, machines: str
) -> None:
    script = str(repository / "tests" / "support" / "torchrun_script.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    done = subprocess.run(
        [*torchrun, script, devices, schedule, machines], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is exact") == n_ranks


@pytest.mark.parametrize(("devices", "n_ranks"), [("[['cpu', 'cpu']]", 2), ("[['cpu', 'cpu'], ['cpu', 'cpu']]", 4)])
def test_hooks_accumulation_sharded_optimizers_and_weights_from_files(
    repository: Path, tmp_path: Path, devices: str, n_ranks: int
) -> None:
    script = str(repository / "tests" / "support" / "torchrun_hooks.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    command = [*torchrun, script, devices, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is exact") == n_ranks


def test_a_wrong_number_of_ranks_says_how_many(repository: Path) -> None:
    script = str(repository / "tests" / "support" / "torchrun_script.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, script, "[['cpu'], ['cpu'], ['cpu']]", "1f1b", "one"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode != 0
    assert "the plan has 3 workers and torchrun started 2 ranks" in done.stderr
    assert "torchrun --nproc-per-node 3" in done.stderr
