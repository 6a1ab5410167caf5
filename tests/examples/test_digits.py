"""The demo trains, proves parity and writes its files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import stagecut


def test_the_demo_learns_and_writes_plan_picture_and_report(repository: Path, tmp_path: Path) -> None:
    script = str(repository / "examples" / "digits.py")
    done = subprocess.run(
        [sys.executable, script, "--epochs", "3", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exact: loss and 59 gradients") == 2
    assert "predicted" in done.stdout
    assert "epoch  3/3" in done.stdout
    plan = stagecut.load(tmp_path / "plan.json")
    assert len(plan.stages) == 2
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    assert "Content-Security-Policy" in (tmp_path / "plan.html").read_text()
