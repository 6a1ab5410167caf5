"""What the documents say holds: doctests run, commands exist, links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import stagecut
from stagecut.partitioner.devices import GIB, NAMES, known_device
from stagecut.tools.partition_viz import main

WITH_DOCTESTS = (
    "stagecut",
    "stagecut.records",
    "stagecut.partitioner.cluster",
    "stagecut.partitioner.folding",
    "stagecut.partitioner.placing",
    "stagecut.partitioner.wording",
    "stagecut.structure",
    "stagecut.runtime.batch",
    "stagecut.runtime.program.timeline",
    "stagecut.runtime.schedules.interleaved",
    "stagecut.runtime.schedules.one_way",
    "stagecut.runtime.schedules.placement",
    "stagecut.runtime.schedules.tokens",
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", WITH_DOCTESTS)
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_links_in_documents_lead_to_files(repository: Path) -> None:
    for document in (*repository.glob("*.md"), *repository.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_files_named_in_the_architecture_exist(repository: Path) -> None:
    text = (repository / "docs" / "architecture.md").read_text()
    named = re.findall(r"((?:partitioner|runtime)/[a-z_/]+\.py)", text)
    assert len(named) > 5
    for path in named:
        assert (repository / path).exists(), path


def test_the_table_of_devices_is_what_plans_are_made_with(repository: Path) -> None:
    text = (repository / "docs" / "clusters.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if " GiB | " in line]
    assert tuple(row[0] for row in rows) == NAMES
    for name, *rates, memory, bandwidth, inside, between, _ in rows:
        known = known_device(name)
        for dtype, tflops in zip(("bfloat16", "float16", "float32", "float64"), rates):
            slow = dtype in ("float32", "float64") or float(tflops) <= float(rates[2])
            assert known.kind.rate(dtype) == pytest.approx(float(tflops) * 1e12 * (0.8 if slow else 0.5))
        assert known.kind.memory_bytes == int(memory.split()[0]) * GIB
        assert known.kind.bytes_per_s == pytest.approx(float(bandwidth) * 0.8e12)
        assert known.inside.bytes_per_s == pytest.approx(float(inside.split()[0]) * 0.8e9)
        assert known.between.bytes_per_s == pytest.approx(float(between) * 0.8e9)


def test_every_public_name_can_be_loaded() -> None:
    for name in stagecut.__all__:
        assert getattr(stagecut, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = stagecut.nonsense


def test_the_commands_of_the_readme_are_understood(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"\$ partition-viz (.+)", (repository / "README.md").read_text())
    assert len(commands) >= 3
    for command in commands:
        assert main([command.split()[0], "--help"]) == 0
        assert "partition-viz" in capsys.readouterr().out


def test_the_commands_of_the_tools_page_run(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (repository / "docs" / "partition-viz.md").read_text()
    for line in re.findall(r"^\$ partition-viz (.+)", page, re.MULTILINE):
        command, _, target = line.partition("  #")[0].partition(" > ")
        failed = 1 if command.startswith("check") else 0
        assert main(shlex.split(command)) == failed, line
        if target:
            Path(target.strip()).write_text(capsys.readouterr().out)
    for name in ("plan.json", "unet.html", "run.json", "run.html", "both.html", "plan.svg", "partition-viz.bash"):
        assert (tmp_path / name).stat().st_size > 0, name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("document", ["planner.md", "schedules.md", "reliability.md"])
def test_the_code_in_documents_runs(
    document: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (repository / "docs" / document).read_text(), re.DOTALL))
    (tmp_path / "code.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        runpy.run_path(str(tmp_path / "code.py"))
    assert capsys.readouterr().out.strip()


def test_the_schedule_in_the_documents_is_what_the_command_draws(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (drawn,) = re.findall(r"```text\n(.*?)```", (repository / "docs" / "schedules.md").read_text(), re.DOTALL)
    names = ("forward_s", "backward_input_s", "backward_weight_s", "activation_bytes")
    costs = {**{name: [1, 1, 1] for name in names}, "weight_grad_bytes": [0.5, 0.5, 0.5]}
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    main(["schedule", "--costs", str(tmp_path / "costs.json"), "--name", "zb-h1", "--microbatches", "4"])
    assert _without_seconds(capsys.readouterr().out) == _without_seconds(drawn)


def _without_seconds(text: str) -> str:
    return re.sub(r"; \d+\.\d+ s$", "", text, flags=re.MULTILINE)


def test_the_capture_example_of_the_readme_prints_what_it_says(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, section = (repository / "README.md").read_text().partition("## What capture could not open\n")
    code, text = re.findall(r"```(?:python|text)\n(.*?)```", section, re.DOTALL)[:2]
    (tmp_path / "net.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        runpy.run_path(str(tmp_path / "net.py"))
    assert capsys.readouterr().out == text
