import base64
import io
import json
import os
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from stagecut.partitioner.plan import FORMAT, parse
from stagecut.tools.partition_viz import main
from stagecut.tools.text import console_for, print_plan


@pytest.fixture
def model_file(tmp_path):
    def write(result):
        (tmp_path / "model.py").write_text(f"import torch\n\ndef build():\n    return {result}\n")
        return f"{tmp_path}/model.py:build"

    return write


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_arguments_the_help_is_printed_with_examples(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "partition-viz show demo:resnet" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", ["show", "report", "check", "export", "sweep", "compare", "solve", "schedule"])
def test_a_subcommand_that_stands_alone_prints_its_examples(command, capsys):
    assert main([command]) == 2
    captured = capsys.readouterr()
    assert f"examples:\n  partition-viz {command} " in captured.err
    assert captured.out == ""


def test_every_subcommand_has_examples_and_exit_codes_in_its_help(capsys):
    assert main(["--help"]) == 0
    listed = re.findall(r"^    ([a-z]+)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    assert {"show", "schema", "completion"} <= set(listed)
    for command in listed:
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"examples:\n  partition-viz {command} " in text
        assert "exit codes: 0 " in text


def test_show_prints_the_plan_as_plain_ascii_tables(plan, saved, capsys):
    assert main(["show", saved]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert out.startswith("Skips: predicted step ")
    for part in ("limited by stage", "stage | devices", "per microbatch", "worker 2", "against chosen"):
        assert part in out
    for wire in plan.wires:
        assert wire.value in out


def test_show_plans_a_model_for_the_devices_that_are_named(capsys):
    options = ["--devices", "2", "--microbatches", "2", "--schedule", "1f1b", "--batch", "8"]
    assert main(["show", "demo:mlp", *options]) == 0
    assert "1f1b, 2 microbatches, 8 rows" in capsys.readouterr().out


def test_several_stages_of_a_device_are_shown_as_such(tmp_path, capsys):
    options = ["--cluster", "sim:2xA100-80GB", "--replicas", "1", "--microbatches", "4", "--schedule", "zb-v"]
    assert main(["show", "demo:mlp", *options]) == 0
    out = capsys.readouterr().out
    assert "fullest is the device of stages " in out
    assert "worker 1 (stages 1, 2) waits longest" in out or "worker 0 (stages 0, 3) waits longest" in out
    assert "2 (same device)" in out
    assert "4 x 1, 2 to a device" in out
    assert main(["report", "demo:mlp", *options, "-o", str(tmp_path / "plan.svg")]) == 0
    drawn = (tmp_path / "plan.svg").read_text()
    assert "▼ same device" in drawn
    assert "stages 0, 3" in drawn


def test_a_schedule_that_is_not_known_names_those_that_are(capsys):
    assert main(["show", "demo:mlp", "--schedule", "gpipe"]) == 2
    assert "schedule must be one of 1f1b, fill-drain, " in capsys.readouterr().err


def test_json_is_the_plan(model_file, capsys):
    spec = model_file("torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), (torch.randn(4, 4),)")
    options = ["--cluster", "sim:4xA100-80GB", "--replicas", "2", "--memory-gib", "1.5", "--microbatches", "1"]
    assert main(["show", spec, "--json", *options]) == 0
    plan = parse(json.loads(capsys.readouterr().out))
    assert [len(stage.devices) for stage in plan.stages] == [2, 2]
    assert plan.stages[0].memory_limit_bytes == 1.5 * 2**30


@pytest.mark.parametrize("command", [["show"], ["check"], ["compare"], ["sweep"], ["solve"], ["schedule"]])
def test_every_command_that_prints_prints_json_and_nothing_else(command, saved, tmp_path, capsys):
    costs = {"forward_s": [1, 1], "backward_input_s": [1, 1], "backward_weight_s": [1, 1]}
    costs |= {"activation_bytes": [1, 1], "weight_grad_bytes": [0.5, 0.5]}
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    cost_graph = {
        "nodes": [{"id": "a", "compute_s": {"cpu": 1.0}}],
        "edges": [],
        "graph": {"devices": [{"name": "cpu:0", "kind": "cpu"}]},
    }
    (tmp_path / "graph.json").write_text(json.dumps(cost_graph))
    more = {
        "compare": [saved, saved],
        "sweep": ["demo:mlp", "--stages", "2", "--microbatches", "2", "--schedule", "1f1b"],
        "solve": [str(tmp_path / "graph.json")],
        "schedule": ["--costs", str(tmp_path / "costs.json"), "--name", "1f1b", "--microbatches", "2"],
    }.get(command[0], [saved])
    assert main([*command, *more, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_the_schema_is_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$id"] == f"urn:stagecut:plan:{FORMAT}"


def test_warnings_go_to_stderr(model_file, capsys):
    spec = model_file("torch.nn.Linear(4, 4), (torch.randn(4, 4),)")
    path = Path(spec.rpartition(":")[0])
    path.write_text(path.read_text().replace("return", "import warnings; warnings.warn('careful'); return"))
    assert main(["show", spec, "--json"]) == 0
    captured = capsys.readouterr()
    assert "partition-viz: warning: careful" in captured.err
    assert json.loads(captured.out)


def test_json_of_a_plan_file_is_that_file(saved, capsys):
    assert main(["show", saved, "--json"]) == 0
    assert capsys.readouterr().out == Path(saved).read_text()


@pytest.mark.parametrize(
    ("name", "start"),
    [("plan.html", "<!doctype html>"), ("plan.svg", "<svg xmlns="), ("again.trace.json", '{"traceEvents": [')],
)
def test_report_writes_the_same_bytes_every_time(saved, tmp_path, capsys, name, start):
    first, second = tmp_path / name, tmp_path / f"second-{name}"
    assert main(["report", saved, "-o", str(first)]) == 0
    assert main(["report", saved, "-o", str(second)]) == 0
    assert first.read_text().startswith(start)
    assert first.read_bytes() == second.read_bytes()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "demo:nothing"], "there is no demo model 'nothing'"),
        (["show", "missing.json"], "missing.json: No such file"),
        (["show", "demo:mlp", "--devices", "2", "--cluster", "sim:2xA100"], "not allowed with"),
        (["show", "demo:mlp", "--cluster", "sim:2xZ80"], "describes no cluster"),
        (["show", "demo:mlp", "--devices", "2", "--replicas", "3"], "do not divide"),
        (["show", "demo:mlp", "--memory-gib", "nan"], "expected a positive number"),
        (["show", "demo:mlp", "--microbatches", "0"], "expected at least 1"),
        (["report", "demo:mlp"], "required: -o"),
        (["draw", "demo:mlp"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_2_with_one_readable_message(arguments, said, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_options_that_cannot_change_a_plan_file_are_refused(saved, capsys):
    assert main(["show", saved, "--devices", "2", "--memory-gib", "1"]) == 2
    assert "--devices, --memory-gib cannot change it" in capsys.readouterr().err


def test_a_model_that_cannot_be_captured_is_3(model_file, capsys):
    assert main(["show", model_file("torch.nn.Linear(4, 4), (3,)")]) == 3
    assert "no tensor argument" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_4(model_file, capsys):
    spec = model_file("torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), (torch.randn(4, 4),)")
    assert main(["show", spec, "--memory-gib", "1e-9"]) == 4
    captured = capsys.readouterr()
    assert "no plan was found that fits in memory" in captured.err
    assert "try: raise" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["schema"], 0),
        (["check", "PLAN", "--fail-on", "stages>0"], 1),
        (["show", "demo:nothing"], 2),
        (["show", "MODEL"], 3),
        (["show", "demo:mlp", "--memory-gib", "1e-9"], 4),
    ],
)
def test_the_process_ends_with_the_exit_code(arguments, code, saved, model_file):
    given = {"PLAN": saved, "MODEL": model_file("torch.nn.Linear(4, 4), (3,)")}
    command = [sys.executable, "-m", "stagecut.tools.partition_viz", *(given.get(part, part) for part in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert bool(done.stdout) is (code < 2)


def test_an_output_that_cannot_be_written_is_2(saved, tmp_path, capsys):
    assert main(["report", saved, "-o", str(tmp_path / "missing" / "plan.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_colour_unless_no_color_is_set(plan, timeline, monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    print_plan(plan, timeline, console_for(stream))
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", stream.getvalue())) is not no_color
    assert "─" in stream.getvalue()


def test_names_are_neither_markup_nor_escape_sequences(hostile_plan):
    renamed = replace(hostile_plan, wires=tuple(replace(w, value=f"[red]{w.value}\x1b[0m") for w in hostile_plan.wires))
    stream = io.StringIO()
    print_plan(renamed, hostile_plan.predicted, console_for(stream))
    assert "[red]" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_help_does_not_wait_for_torch():
    code = "import sys; from stagecut.tools.partition_viz import main; print(main([]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 False\n"


def test_a_reader_that_leaves_early_is_no_error(saved):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "stagecut.tools.partition_viz", "show", saved]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "demo:mlp", "-o", "{tmp}"], "is a folder"),
        (["report", "demo:mlp", "-o", "{tmp}/missing/plan.html"], "there is no folder"),
        (["report", "demo:mlp", "-o", "{tmp}/plan.docx"], "ends in no format that is known"),
        (["export", "demo:mlp", "-o", "{tmp}/plan.html"], "ends in no format that is known"),
        (["report", "demo:mlp", "{tmp}/no.json", "-o", "{tmp}/plan.html"], "no.json is no file"),
        (["profile", "demo:mlp", "--devices", "cpu,cpu", "-o", "{tmp}"], "is a folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_planned(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stagecut.models.registry.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main([part.replace("{tmp}", str(tmp_path)) for part in arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_cost_graph_is_told_from_a_plan(tmp_path, capsys):
    (tmp_path / "graph.json").write_text('{"nodes": [], "edges": [], "graph": {}}')
    assert main(["show", str(tmp_path / "graph.json")]) == 2
    assert "partition-viz solve" in capsys.readouterr().err


def test_a_page_of_several_plans_does_not_say_where_they_were(saved, tmp_path, capsys):
    (tmp_path / "secret").mkdir()
    other = tmp_path / "secret" / "other.json"
    other.write_bytes(Path(saved).read_bytes())
    assert main(["report", saved, str(other), "-o", str(tmp_path / "both.HTML")]) == 0
    page = (tmp_path / "both.HTML").read_text()
    (packed,) = re.findall(r'id="data">([^<]*)<', page)
    data = zlib.decompress(base64.b64decode(packed)).decode()
    assert "other.json" in data
    assert "secret" not in page + data
