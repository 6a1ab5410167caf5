import json

import pytest

from stagecut.errors import StagecutError
from stagecut.tools.partition_viz import main
from stagecut.tools.sweep import sweep

OPTIONS = ["sweep", "demo:mlp", "--cluster", "sim:4xA100-80GB", "--batch", "16"]


def test_every_combination_is_planned_and_the_best_are_marked(capsys):
    choices = ["--stages", "2,4", "--microbatches", "4", "--recompute", "no,yes"]
    assert main([*OPTIONS, *choices, "--schedule", "1f1b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 2 * 2
    assert len({json.dumps(entry["arguments"]) for entry in found}) == 4
    assert all(entry["problem"] is None for entry in found)
    steps = [entry["step_s"] for entry in found]
    assert steps == sorted(steps)
    assert found[0]["best"]
    for entry in found:
        beaten = any(
            other is not entry
            and other["step_s"] <= entry["step_s"]
            and other["memory_bytes"] <= entry["memory_bytes"]
            and (other["step_s"], other["memory_bytes"]) != (entry["step_s"], entry["memory_bytes"])
            for other in found
        )
        assert entry["best"] == (not beaten)


def test_the_table_says_what_to_give_to_compile(capsys):
    assert main([*OPTIONS, "--replicas", "1,3", "--microbatches", "2", "--schedule", "1f1b"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert "replicas=1, microbatches=2, schedule='1f1b'" in out
    assert "no plan" in out
    assert "4 devices do not divide into stages of 3 replicas" in out


def test_nothing_that_can_be_planned_is_4(capsys):
    assert main([*OPTIONS, "--replicas", "3"]) == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--stages", "2,x"], "expected values separated by commas"),
        (["--stages", "0"], "expected at least 1"),
        (["--recompute", "maybe"], "expected yes or no"),
    ],
)
def test_wrong_choices_are_2(capsys, more, said):
    assert main([*OPTIONS, *more]) == 2
    assert said in capsys.readouterr().err


def test_a_problem_is_kept_and_others_are_planned_all_the_same(plan):
    def make(stages):
        if stages == 2:
            raise StagecutError("no such cut")
        return plan

    first, second = sweep(make, [{"stages": 2}, {"stages": 3}])
    assert (first.step_s, first.best) == (plan.prediction.step_s, True)
    assert (second.problem, second.best) == ("no such cut", False)
