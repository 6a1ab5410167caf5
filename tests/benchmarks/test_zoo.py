"""The zoo runs as its help says, and its table says what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 300


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("zoo")
    command = [sys.executable, str(repository / "benchmarks" / "zoo.py"), "--group", "torchvision", "--group", "nasty"]
    command += [
        "--only",
        "resnet18",
        "--only",
        "squeezenet1_1",
        "--only",
        "state.counter_as_a_factor",
        "--workers",
        "2",
    ]
    command += [
        "--methods",
        "eager,stagecut,fx",
        "--json",
        str(folder / "zoo.json"),
        "--markdown",
        str(folder / "zoo.md"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "zoo.json").read_text()), (folder / "zoo.md").read_text()


def test_every_model_is_judged_by_every_method(written: tuple[dict[str, Any], str]) -> None:
    entries = written[0]["entries"]
    assert sorted(entries) == ["nasty/state.counter_as_a_factor", "torchvision/resnet18", "torchvision/squeezenet1_1"]
    for entry in entries.values():
        assert sorted(entry["methods"]) == ["eager", "fx", "stagecut"]
    checks = entries["torchvision/resnet18"]["methods"]["stagecut"]["checks"]
    assert list(checks) == ["train", "other_seed", "other_batch", "eval", "train_again"]
    assert all(check["ok"] and check["bitwise"] for check in checks.values())


def test_what_symbolic_trace_bakes_in_is_seen(written: tuple[dict[str, Any], str]) -> None:
    methods = written[0]["entries"]["nasty/state.counter_as_a_factor"]["methods"]
    assert all(check["ok"] for check in methods["stagecut"]["checks"].values())
    assert not all(check["ok"] for check in (methods["fx"].get("checks") or {"": {"ok": False}}).values())


def test_balance_is_measured_where_blocks_repeat(written: tuple[dict[str, Any], str]) -> None:
    record = written[0]["entries"]["torchvision/resnet18"]["methods"]["stagecut"]
    assert record["n_blocks"] == 8
    assert 1.0 <= record["balance"] < 1.3
    assert record["heaviest"] <= record["balance"]


def test_the_document_has_a_table_for_each_group_and_the_reasons(written: tuple[dict[str, Any], str]) -> None:
    _, text = written
    rows = [line for line in text.splitlines() if line.startswith("| stagecut.capture | ")]
    assert len(rows) == 2
    assert rows[0].split(" | ")[1:4] == ["2", "2", "0"]
    assert "- `nasty/state.counter_as_a_factor`: " in text
    assert "site-packages" not in text
