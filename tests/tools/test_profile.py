"""Measured runs on the command line: made by two real workers, and read wherever a plan is."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stagecut
from stagecut.partitioner.measured_run import MeasuredRun, measured_run, read_run
from stagecut.partitioner.plan import load
from stagecut.tools.measured import comparisons
from stagecut.tools.partition_viz import main

pytestmark = pytest.mark.usefixtures("no_workers_left")

PLANNING = ["--stages", "2", "--replicas", "1", "--microbatches", "2", "--schedule", "1f1b", "--batch", "8"]
COSTS = ["--costs", "analytic"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Return the path of a run of two workers."""
    path = tmp_path_factory.mktemp("run") / "run.json"
    options = ["--devices", "cpu,cpu", *PLANNING, *COSTS, "--steps", "3"]
    assert main(["profile", "demo:mlp", *options, "-o", str(path)]) == 0
    return str(path)


@pytest.fixture
def measured(plan):
    """Return a run of the plan in which everything took twice as long as simulated."""
    timeline = plan.predicted
    spans = tuple(replace(one, start_s=2 * one.start_s, end_s=2 * one.end_s) for one in timeline.spans)
    step_s = 2 * plan.prediction.step_s
    return measured_run(plan, replace(timeline, source="measured", spans=spans), (step_s, 1.5 * step_s, 0.5 * step_s))


@pytest.fixture
def measured_file(measured, tmp_path):
    measured.save(tmp_path / "measured.json")
    return str(tmp_path / "measured.json")


def test_a_run_has_the_plan_and_what_two_workers_did(path):
    run = read_run(path)
    assert run.plan.model == "MLP"
    assert (len(run.plan.stages), run.plan.n_microbatches, run.plan.batch_rows) == (2, 2, 8)
    assert len(run.steps_s) == 3
    assert all(seconds > 0 for seconds in run.steps_s)
    computed = sorted((s.worker, s.op, s.stage, s.microbatch) for s in run.timeline.spans if s.op in "FB")
    assert computed == sorted((s, op, s, m) for op in "FB" for s in range(2) for m in range(2))
    assert 0 < run.timeline.makespan_s <= max(run.steps_s)


def test_profile_prints_one_table_of_predicted_and_measured_seconds(tmp_path, capsys):
    options = ["--devices", "1", "--batch", "8", *COSTS, "--steps", "1", "-o", str(tmp_path / "one.json")]
    assert main(["profile", "demo:mlp", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.isascii()
    assert captured.err == f"wrote {tmp_path / 'one.json'}\n", "no progress where nobody sees it"
    lines = captured.out.strip().splitlines()
    assert lines[0].startswith("predicted against measured, medians of microbatches and of 1 step; torch ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["", "predicted", "measured", "spread", "measured / predicted"]
    assert [row[0] for row in rows[2:]] == ["stage 0 forward", "stage 0 backward", "step"]
    assert sum(line.startswith("+-") for line in lines) == 2, "one table"


def test_json_has_the_numbers_of_the_table(path, tmp_path, capsys):
    options = ["--plan", path, "--steps", "2", "--json", "-o", str(tmp_path / "again.json")]
    assert main(["profile", "demo:mlp", *options]) == 0
    found, run = json.loads(capsys.readouterr().out), read_run(tmp_path / "again.json")
    assert run.plan == read_run(path).plan, "the plan of a run runs again as it is"
    assert found["step"]["steps_s"] == list(run.steps_s)
    assert found["step"]["measured_s"] == run.step_s
    assert found["step"]["ratio"] == pytest.approx(run.step_s / run.plan.prediction.step_s)
    assert [(row["stage"], row["what"]) for row in found["stages"]] == [
        (stage, what) for stage in range(2) for what in ("forward", "backward")
    ]
    assert all(row["least_s"] <= row["measured_s"] <= row["most_s"] for row in [*found["stages"], found["step"]])


def test_ratios_are_of_medians_of_the_same_computations(measured):
    *stages, step = comparisons(measured, measured.plan.predicted)
    assert [(row.stage, row.what) for row in stages] == [(s, w) for s in range(3) for w in ("forward", "backward")]
    assert [row.ratio for row in stages] == pytest.approx([2.0] * 6)
    assert step.ratio == pytest.approx(2.0)
    assert (step.least_s, step.most_s) == (measured.steps_s[2], measured.steps_s[1])


def test_what_was_not_predicted_has_no_ratio(measured):
    without = replace(
        measured.plan.predicted, spans=tuple(s for s in measured.plan.predicted.spans if s.op != "B" or s.stage)
    )
    row = comparisons(measured, without)[1]
    assert (row.stage, row.what, row.predicted_s, row.ratio) == (0, "backward", None, None)


def test_show_has_the_measured_step_under_the_predicted_one(measured_file, saved, capsys):
    assert main(["show", measured_file]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    places = [out.index(part) for part in ("simulated step", "measured step", "predicted against measured", "why")]
    assert places == sorted(places)
    assert out.count("worker 2   ") == 2, "a grid each"
    assert main(["show", saved]) == 0
    plain = capsys.readouterr().out
    assert "measured step" not in plain
    assert plain.startswith(out[: places[0]])


def test_json_of_a_run_is_that_file(measured_file, capsys):
    assert main(["show", measured_file, "--json"]) == 0
    assert capsys.readouterr().out == Path(measured_file).read_text()


def test_check_takes_limits_of_what_was_measured(measured, measured_file, saved, capsys):
    step_ms = measured.step_s * 1e3
    assert main(["check", measured_file, "--fail-on", f"measured>{step_ms * 1.01:.6f}ms,slower>2.5"]) == 0
    assert main(["check", measured_file, "--fail-on", "slower>1.5"]) == 1
    assert "FAILED: slower>1.5 (slower is 2)" in capsys.readouterr().out
    assert main(["check", saved, "--fail-on", "slower>1.5"]) == 2
    assert "there is no 'slower'" in capsys.readouterr().err, "a plan was not measured"


@pytest.mark.parametrize("first", ["plan", "run"])
def test_a_plan_and_its_run_are_compared(measured, measured_file, saved, capsys, first):
    files = [saved, measured_file] if first == "plan" else [measured_file, saved]
    assert main(["compare", *files]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("|slower ")]
    assert [cell.strip() for cell in line.strip("|").split("|")[1:]] == (["-", "2"] if first == "plan" else ["2", "-"])
    assert "the same cut" in out
    assert main(["compare", *files, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    found = records[first == "plan"]["metrics"]
    assert found["measured"] == measured.step_s
    assert "measured" not in records[first == "run"]["metrics"]


@pytest.mark.parametrize("command", ["report", "export"])
def test_a_trace_of_a_run_has_both_steps(path, tmp_path, command):
    for name in ("first.trace.json", "second.trace.json"):
        assert main([command, path, "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "first.trace.json").read_bytes() == (tmp_path / "second.trace.json").read_bytes()
    events = json.loads((tmp_path / "first.trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"simulated step", "measured step"}
    starts, ends = ({(e["pid"], e["id"]) for e in events if e["ph"] == kind} for kind in "sf")
    assert starts == ends
    assert len(starts) == 2 * (2 + 2), "in each step two activations and two gradients"
    for arrow in (e for e in events if e["ph"] in "sf"):
        own = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (arrow["pid"], arrow["tid"])]
        assert any(e["ts"] <= arrow["ts"] <= e["ts"] + e["dur"] for e in own)
    at = {(e["pid"], e["id"], e["ph"]): e["ts"] for e in events if e["ph"] in "sf"}
    assert all(at[*arrow, "s"] <= at[*arrow, "f"] for arrow in starts), "real clocks agree on before and after"


def test_pictures_of_a_run_have_the_measured_step(path, tmp_path):
    for name in ("run.svg", "run.html"):
        assert main(["report", path, "-o", str(tmp_path / name)]) == 0
        text = (tmp_path / name).read_text()
        assert text.index("simulated step") < text.index("measured step")
    assert main(["export", path, "-o", str(tmp_path / "exported.svg")]) == 0
    assert (tmp_path / "exported.svg").read_bytes() == (tmp_path / "run.svg").read_bytes()


def test_the_plan_of_a_run_can_be_taken_out_of_it(measured, measured_file, tmp_path):
    assert main(["export", measured_file, "-o", str(tmp_path / "plan.json")]) == 0
    assert load(tmp_path / "plan.json") == measured.plan
    assert main(["export", measured_file, "-o", str(tmp_path / "ops.csv")]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "ops.csv").read_text())))
    assert len(rows) == len(measured.plan.ops)


def test_names_in_a_run_are_inert(hostile_plan, tmp_path, capsys):
    timeline = replace(hostile_plan.predicted, source="measured")
    run = MeasuredRun(1, hostile_plan, timeline, (1.0,), "</script><img src=x onerror=alert(2)>\x1b[2J", 1)
    run.save(tmp_path / "evil.json")
    assert main(["show", str(tmp_path / "evil.json")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "alert(2)>\\x1b[2J" in out
    assert main(["report", str(tmp_path / "evil.json"), "-o", str(tmp_path / "evil.html")]) == 0
    page = (tmp_path / "evil.html").read_text()
    assert "<img" not in page
    assert "\x1b" not in page


@pytest.fixture
def model_file(tmp_path):
    (tmp_path / "model.py").write_text(
        "import torch\n\n"
        "class Odd(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).square()\n\n"
        "class Lossy(Odd):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).mean()\n\n"
        "def without():\n    return Odd(4, 4), torch.randn(4, 4)\n\n"
        "def own():\n    return Lossy(4, 4), torch.randn(4, 4)\n"
    )
    return f"{tmp_path}/model.py"


def test_a_model_that_returns_its_loss_needs_no_other(model_file, tmp_path):
    output = str(tmp_path / "own.json")
    assert main(["profile", f"{model_file}:own", "--devices", "1", *COSTS, "--steps", "1", "-o", output]) == 0
    assert read_run(output).plan.batch_rows == 4


def test_a_model_without_a_loss_is_refused_with_what_to_do(model_file, tmp_path, capsys):
    output = tmp_path / "run.json"
    assert main(["profile", f"{model_file}:without", "--devices", "1", *COSTS, "-o", str(output)]) == 2
    captured = capsys.readouterr()
    assert "the loss must be a 0-dim tensor" in captured.err
    assert "try: a model without a loss beside it has to return its own" in captured.err
    assert "Traceback" not in captured.err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["PLAN"], "is a plan, and only a model can run"),
        (["demo:mlp", "--cluster", "sim:2xA100-80GB"], "describes devices that need not exist"),
        (["demo:mlp", "--cluster", "cluster.toml"], "try: --devices cpu,cpu to measure here"),
        (["demo:mlp", "--devices", "sim:2xA100-80GB"], "describes devices that need not exist"),
        (["demo:mlp", "--devices", "2", "--cluster", "cpu,cpu"], "not allowed with"),
        (["demo:mlp", "--steps", "0"], "expected at least 1"),
        (["demo:mlp", "--plan", "PLAN", "--stages", "2", "--batch", "8"], "--stages, --batch cannot change it"),
        (["demo:mlp", "--plan", "PLAN"], "the plan was made for Skips"),
        (["demo:mlp", "--plan", "missing.json"], "missing.json: No such file"),
        (["demo:nothing"], "there is no demo model 'nothing'"),
    ],
)
def test_what_cannot_be_measured_is_2_with_one_readable_message(arguments, said, saved, tmp_path, capsys):
    output = tmp_path / "run.json"
    given = [saved if part == "PLAN" else part for part in arguments]
    assert main(["profile", *given, "-o", str(output)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert (captured.out, output.exists()) == ("", False)


def test_a_plan_for_devices_that_are_not_here_is_refused(simulated_plan, tmp_path, capsys):
    simulated_plan.save(tmp_path / "simulated.json")
    assert (
        main(["profile", "demo:mlp", "--plan", str(tmp_path / "simulated.json"), "-o", str(tmp_path / "r.json")]) == 2
    )
    captured = capsys.readouterr()
    assert "is a plan for A100:0, A100:1, A100:2, A100:3, and it cannot run here" in captured.err
    assert "try: leave out --plan" in captured.err


def test_a_plan_for_another_batch_is_refused(model_file, saved, tmp_path, capsys):
    assert main(["profile", f"{model_file}:own", "--plan", saved, "-o", str(tmp_path / "run.json")]) == 2
    assert "the plan is for 8 rows, and the example inputs" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(tmp_path, capsys):
    assert main(["profile", "no.such.module:build", "-o", str(tmp_path / "no" / "run.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err, "and not that there is no such module"


def test_steps_are_told_one_by_one():
    pipeline = stagecut.compile(
        torch.nn.Linear(4, 1), ["cpu"], loss_fn=torch.nn.functional.mse_loss, costs="analytic", launch="inline"
    )
    told = []
    with pipeline:
        found = pipeline.profile(
            torch.randn(4, 4), target=torch.randn(4, 1), steps=2, progress=lambda *state: told.append(state)
        )
    assert told == [("measuring steps", done, 2) for done in range(3)]
    assert len(found.steps_s) == 2
