"""The code of the README runs as a script without a guard, in a notebook, and under torchrun, and learns the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from user_script import CODE, PLAIN, SCRIPT, SETUP, TAIL

TIMEOUT_S = 400


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss (\d+\.\d+)", text)]


@pytest.fixture(scope="module")
def plain_loss(tmp_path_factory: pytest.TempPathFactory) -> float:
    (loss,) = losses(run(sys.executable, "-c", PLAIN, cwd=tmp_path_factory.mktemp("plain")))
    return loss


def test_a_script_without_main_guard(tmp_path: Path, plain_loss: float) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    assert losses(run(sys.executable, "train.py", cwd=tmp_path)) == [pytest.approx(plain_loss, abs=2e-6)]


def test_a_notebook_cell(tmp_path: Path, plain_loss: float) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (SETUP, CODE, TAIL)])
    NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(out.get("text", "") for out in notebook.cells[-1].outputs)
    assert losses(printed) == [pytest.approx(plain_loss, abs=2e-6)]


def test_torchrun_with_two_ranks(tmp_path: Path, plain_loss: float) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")
    printed = losses(run(*command, cwd=tmp_path))
    assert printed == [pytest.approx(plain_loss, abs=2e-6)] * 2


def test_the_readme_holds_the_same_code(repository: Path) -> None:
    assert CODE.strip() in (repository / "README.md").read_text()
