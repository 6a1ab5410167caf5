import json
import re
from dataclasses import replace

import pytest

from stagecut.tools.partition_viz import main


@pytest.fixture
def two(plan, tmp_path):
    """The plan, and one that takes longer, with an op that moved between stages that need not agree on it."""
    plan.save(tmp_path / "before.json")
    slower = replace(plan.prediction, step_s=plan.prediction.step_s * 1.5)
    replace(plan, prediction=slower).save(tmp_path / "after.json")
    return str(tmp_path / "before.json"), str(tmp_path / "after.json")


def test_plans_are_put_beside_each_other(two, capsys):
    assert main(["compare", *two]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert "(+50%)" in out
    assert "(=)" in out
    assert "the same cut" in out
    assert main(["compare", *two]) == 0
    assert capsys.readouterr().out == out


def test_ops_that_moved_are_named(plan, two, tmp_path, capsys):
    options = ["--devices", "2", "--microbatches", "2", "--schedule", "1f1b", "--batch", "8", "--replicas", "1"]
    for n in (2, 3):
        assert main(["show", "demo:mlp", *options[2:], "--devices", str(n), "--stages", str(n), "--json"]) == 0
        (tmp_path / f"{n}.json").write_text(capsys.readouterr().out)
    assert main(["compare", str(tmp_path / "2.json"), str(tmp_path / "3.json")]) == 0
    out = capsys.readouterr().out
    assert "on another stage" in out
    assert ": 1 -> 2" in out
    assert main(["compare", two[0], str(tmp_path / "2.json"), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["metrics"]["step"] == plan.prediction.step_s
    assert first["moved_ops"] == 0
    assert second["moved_ops"] is None, "another graph"


def test_a_change_that_is_too_small_to_see_has_no_sign(plan, tmp_path, capsys):
    slower, bubble = plan.prediction.step_s * 1.001, plan.prediction.bubble
    for name, prediction in (
        ("a", plan.prediction),
        ("b", replace(plan.prediction, step_s=slower, bubble=bubble + 1e-4)),
        ("c", replace(plan.prediction, step_s=2 * plan.prediction.step_s - slower, bubble=bubble - 1e-4)),
    ):
        replace(plan, prediction=prediction).save(tmp_path / f"{name}.json")
    assert main(["compare", *(str(tmp_path / f"{name}.json") for name in "abc")]) == 0
    out = capsys.readouterr().out
    rows = {line.strip("|").split()[0]: line for line in out.splitlines() if line.startswith("|")}
    assert rows["step"].count("(0%)") == 2
    assert rows["bubble"].count("(0 points)") == 2
    assert not re.search(r"\([-+]0", out)


def test_one_plan_is_not_compared(two, capsys):
    assert main(["compare", two[0]]) == 2
    assert "compare takes two plans or more" in capsys.readouterr().err
