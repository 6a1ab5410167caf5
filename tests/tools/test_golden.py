"""What the tool writes of one plan, byte for byte: a change of these files is a change that users see."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecut.tools.partition_viz import main

FOLDER = Path(__file__).parent / "golden"
PLAN = str(FOLDER / "plan.json")


def test_the_plan_in_the_terminal(capsys):
    assert main(["show", PLAN]) == 0
    written = capsys.readouterr().out
    assert written == (FOLDER / "plan.txt").read_text(), f"partition-viz show {PLAN} > plan.txt, if that is meant"


def test_the_conditions_in_the_terminal(capsys):
    assert main(["check", PLAN, "--fail-on", "bubble>0.25"]) == 1
    assert capsys.readouterr().out == (FOLDER / "check.txt").read_text()


@pytest.mark.parametrize("name", ["plan.svg", "plan.dot", "plan.mmd", "plan.csv"])
def test_the_plan_as_a_file(name, tmp_path):
    assert main(["export", PLAN, "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), f"partition-viz export {PLAN} -o {name}"
