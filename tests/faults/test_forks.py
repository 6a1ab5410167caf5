"""Forks after compile: the child is refused with one line, whatever it calls, and the parent goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 240


@pytest.mark.parametrize("launch", ["inline", "local"])
def test_a_forked_child_is_refused_and_data_loaders_fork_at_will(repository: Path, launch: str) -> None:
    support = repository / "tests" / "support"
    path = os.pathsep.join([str(support), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(support / "forking_script.py"), launch],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["all refused", "the parent goes on"]
