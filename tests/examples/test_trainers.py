"""Trainers that own the loop drive a pipeline, and end where they end with the plain model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("example", "needs"), [("hf_trainer", ("transformers", "accelerate")), ("lightning_module", ("lightning",))]
)
def test_a_trainer_drives_a_pipeline(repository: Path, example: str, needs: tuple[str, ...]) -> None:
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    command = [sys.executable, str(repository / "examples" / f"{example}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first result after" in done.stdout
    assert "weights differ by" in done.stdout
