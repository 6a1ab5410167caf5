"""Scripts under torchrun end as they should: no thread is left that could abort a rank, and nobody waits for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 200


def run(repository: Path, how: str, folder: Path) -> str:
    script = str(repository / "tests" / "support" / "torchrun_end.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, script, how, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of threads are read from /proc")
@pytest.mark.parametrize("how", ["stages", "replicas", "a group of its own"])
def test_no_thread_of_gloo_is_left_at_the_end_of_a_script(repository: Path, tmp_path: Path, how: str) -> None:
    said = run(repository, how, tmp_path)
    assert said.count("ends with 0 threads of gloo") == 2, said


def test_a_rank_that_stopped_in_the_middle_does_not_wait_for_the_others(repository: Path, tmp_path: Path) -> None:
    assert "a user's own" in run(repository, "in the middle", tmp_path)
