"""Checkpoints under torchrun: every rank writes what it owns, and other plans go on from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 240


@pytest.mark.parametrize(
    ("first", "second", "shard"),
    [
        ("[['cpu'], ['cpu']]", "[['cpu', 'cpu']]", "whole"),
        ("[['cpu', 'cpu']]", "[['cpu', 'cpu']]", "shard"),
    ],
)
def test_ranks_save_together_and_any_plan_goes_on(
    repository: Path, tmp_path: Path, first: str, second: str, shard: str
) -> None:
    script = str(repository / "tests" / "support" / "torchrun_checkpoint.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, script, first, second, shard, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("goes on alike") == 2
