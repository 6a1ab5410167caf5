import json
import subprocess
import sys

import pytest

from stagecut.runtime.schedules.families import FAMILIES
from stagecut.tools.partition_viz import main


def record(p=4, **changes):
    ones = [1.0] * p
    return {
        "forward_s": ones,
        "backward_input_s": ones,
        "backward_weight_s": ones,
        "activation_bytes": ones,
        "weight_grad_bytes": [0.5] * p,
        "link_s": 0.0,
        **changes,
    }


@pytest.fixture
def costs(tmp_path):
    def write(data):
        path = tmp_path / "costs.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(path)

    return write


def answer(capsys, *arguments):
    assert main(["schedule", "--costs", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, code, *arguments):
    assert main(["schedule", "--costs", *arguments]) == code
    return capsys.readouterr().err


def test_json_has_the_order_and_what_it_comes_to(costs, capsys):
    made = answer(capsys, costs(record()), "--name", "zb-h1", "--microbatches", "8")
    assert made["order"][3][:4] == ["3F0", "3I0", "3F1", "3I1"]
    assert made["makespan_s"] == 27.0
    assert made["bubble"] == pytest.approx(1 - 24 / 27)
    assert made["span_bubble"] == pytest.approx(1 - 24 / 27)
    assert made["peak_bytes"] == [4.0, 3.5, 3.0, 2.5], "half of what waits for its weight gradient is released"
    assert made["peak_in_flight"] == [4] * 4
    assert made["lower_bound_s"] <= 27.0
    assert made["seconds"] >= 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_makes_a_schedule(name, costs, capsys):
    made = answer(capsys, costs(record()), "--name", name, "--microbatches", "8", *workers_for(name))
    assert len(made["order"]) == (4 if FAMILIES[name].placement == "chain" else 2)


def workers_for(name):
    return [] if FAMILIES[name].placement == "chain" else ["--workers", "2"]


def test_the_search_fits_where_published_schedules_do_not(costs, capsys):
    path = costs(record(memory_bytes=[3, 3, 3, 3]))
    assert "holds 4 bytes on worker 0, 1 more" in refusal(capsys, 4, path, "--name", "1f1b", "--microbatches", "8")
    search = ["--name", "search", "--microbatches", "8", "--time-s", "0.2"]
    made, again = (answer(capsys, path, *search, "--seed", "4") for _ in range(2))
    assert max(made["peak_bytes"]) <= 3
    assert made["order"] == again["order"]


def test_a_certificate_proves_or_betters_what_the_search_found(costs, capsys):
    pytest.importorskip("ortools")
    path = costs(record(memory_bytes=[3, 3, 3, 3]))
    search = ["--name", "search", "--microbatches", "6", "--time-s", "0.1"]
    found = answer(capsys, path, *search)
    proven = answer(capsys, path, *search, "--certify-s", "30")
    assert proven["makespan_s"] <= found["makespan_s"]
    assert found["lower_bound_s"] <= proven["lower_bound_s"] <= proven["makespan_s"]
    assert proven["lower_bound_s"] == pytest.approx(proven["makespan_s"], rel=2e-3)


def test_what_was_written_is_read_back_and_timed(costs, capsys, tmp_path):
    path = costs(record())
    written, trace = tmp_path / "order.csv", tmp_path / "trace.json"
    made = answer(capsys, path, "--name", "zb-v", "--microbatches", "6", "--csv", str(written), "--trace", str(trace))
    assert len(json.loads(trace.read_text())["traceEvents"]) == 2 + 4 * 6 * 3
    (tmp_path / "made.json").write_text(json.dumps(made))
    for source in (written, tmp_path / "made.json"):
        again = answer(capsys, path, "--from", str(source))
        assert (again["order"], again["makespan_s"]) == (made["order"], made["makespan_s"])


def test_the_picture_shows_workers_and_the_proof(costs, capsys):
    assert main(["schedule", "--costs", costs(record()), "--name", "1f1b", "--microbatches", "4"]) == 0
    out = capsys.readouterr().out
    assert "worker   0 |FFFFF" in out
    assert "1f1b, 4 microbatches: makespan 21 s" in out
    assert "above the proven bound of" in out
    assert "B backward" in out
    assert "on this placement" not in out, "there is but one"
    assert main(["schedule", "--costs", costs(record()), "--name", "zb-v", "--microbatches", "4"]) == 0
    assert "on this placement" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--name", "1f1b"], "how many microbatches has 1f1b?"),
        (["--name", "1f1b", "--microbatches", "4", "--seed", "1"], "--time-s and --seed belong to --name search"),
        (["--name", "dualpipe-v", "--microbatches", "3", "--workers", "2"], "at least 4 microbatches, got 3"),
        (["--name", "zb-v", "--microbatches", "3", "--workers", "4"], "two stages per worker: 8 on 4 workers, got 4"),
        (["--from", "nowhere.json"], "nowhere.json"),
        (["--from", "x.csv", "--microbatches", "3"], "are in the file that --from names"),
    ],
)
def test_arguments_that_contradict_are_refused(arguments, why, costs, capsys):
    assert why in refusal(capsys, 2, costs(record()), *arguments)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "costs.json: line 1, column 2: not JSON"),
        ('{"forward": []}', "costs.json: $.forward: unknown key"),
        (json.dumps(record(backward_input_s=[1.0])), "costs.json: backward_input_s must have one number for each of 4"),
    ],
)
def test_a_bad_file_is_named_with_the_place(text, why, costs, capsys):
    assert why in refusal(capsys, 2, costs(text), "--name", "1f1b", "--microbatches", "4")


def test_torch_is_not_imported(costs):
    code = (
        "import sys; from stagecut.tools.partition_viz import main; "
        f"main(['schedule', '--costs', {costs(record())!r}, '--name', '1f1b', '--microbatches', '4']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
