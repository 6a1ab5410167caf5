import json

import pytest

from stagecut.errors import StagecutError
from stagecut.tools.metrics import gates, metrics_of
from stagecut.tools.partition_viz import main


def test_numbers_are_those_of_the_plan(plan):
    metrics = metrics_of(plan, plan.predicted)
    assert metrics["step"].value == plan.prediction.step_s
    assert metrics["bubble"].value == plan.prediction.bubble
    assert metrics["stages"].value == len(plan.stages)
    assert metrics["memory"].value == max(stage.device_bytes for stage in plan.stages)
    assert metrics["imbalance"].value >= 1.0
    assert 0 <= metrics["waiting"].value < 1


def test_a_plan_that_is_good_enough_is_0_and_one_that_is_not_is_1(plan, saved, capsys):
    assert main(["check", saved]) == 0
    assert "passed: filled>1" in capsys.readouterr().out
    step_ms = plan.prediction.step_s * 1e3
    assert main(["check", saved, "--fail-on", f"step>{step_ms * 1.01:.6f}ms, stages>9"]) == 0
    assert main(["check", saved, "--fail-on", f"step>{step_ms * 0.99:.6f}ms,stages>9"]) == 1
    captured = capsys.readouterr()
    assert "FAILED: step>" in captured.out
    assert "passed: stages>9" in captured.out
    assert captured.err == ""


def test_json_has_numbers_and_conditions(plan, saved, capsys):
    assert main(["check", saved, "--fail-on", "bubble>=0%,memory>1TiB", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["metrics"]["step"] == {"value": plan.prediction.step_s, "kind": "seconds"}
    assert [(entry["condition"], entry["holds"]) for entry in found["conditions"]] == [
        ("bubble>=0%", True),
        ("memory>1TiB", False),
        ("filled>1", False),
    ]
    assert found["conditions"][1]["limit"] == 2**40


def test_a_plan_over_its_memory_limit_fails_unasked(plan, tmp_path, capsys):
    from dataclasses import replace

    full = replace(plan.stages[0], memory_limit_bytes=plan.stages[0].device_bytes / 2)
    replace(plan, stages=(full, *plan.stages[1:])).save(tmp_path / "full.json")
    assert main(["check", str(tmp_path / "full.json")]) == 1
    assert "FAILED: filled>1 (filled is 200%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bubble", "'bubble' is no condition"),
        ("bubble>0.2;__import__('os')", "is no condition"),
        ("bubbles>0.2", "there is no 'bubbles'"),
        ("bubble>3ms", "bubble is a number of share"),
        ("step>3", "step is a number of seconds"),
        ("step>1e9e9s", "'1e9e9' is no number"),
    ],
)
def test_conditions_that_mean_nothing_are_refused(plan, saved, capsys, text, said):
    with pytest.raises(StagecutError):
        gates(text, metrics_of(plan, plan.predicted))
    assert main(["check", saved, "--fail-on", text]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
