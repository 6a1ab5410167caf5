"""The tests of accelerators on the simulated one, in a process of its own: to other tests there is none."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None or importlib.util.find_spec("ninja") is None,
    reason="the simulated accelerator is built by a C++ compiler and ninja",
)


@pytest.mark.parametrize("file", ["test_exact.py", "test_loops.py"])
def test_on_the_simulated_accelerator(file: str, repository: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(repository / "tests" / "cuda" / file),
    ]
    done = subprocess.run(
        command, cwd=repository, env={**os.environ, "STAGECUT_SIMULATED": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]
    summary = done.stdout.splitlines()[-1]
    assert " passed" in summary, summary
    assert "skipped" not in summary, summary
