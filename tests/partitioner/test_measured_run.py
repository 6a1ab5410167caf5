"""Records of measured runs: written, read, and refused with the place where they are wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stagecut
from stagecut.errors import PlanError
from stagecut.partitioner.measured_run import MeasuredRun, measured_run, parse_run, read_plan, read_run
from stagecut.partitioner.plan import Plan
from stagecut.records import to_json
from stagecut.runtime.program import Timeline


@pytest.fixture(scope="module")
def plan() -> Plan:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())))
    options: dict[str, Any] = {"replicas": 2, "microbatches": 2, "costs": "analytic", "schedule": "1f1b"}
    return stagecut.plan(model, ["cpu"] * 4, example_inputs=(torch.randn(16, 8),), **options)


@pytest.fixture(scope="module")
def run(plan: Plan) -> MeasuredRun:
    """Return what would be measured if everything went as simulated."""
    timeline = replace(plan.predicted, source="measured")
    return measured_run(plan, timeline, (0.03, 0.01, 0.02, 0.05))


def test_a_run_is_read_as_it_was_written(run: MeasuredRun, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")
    assert read_run(tmp_path / "run.json") == run
    run.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "run.json").read_bytes()


def test_a_run_says_what_computed_and_its_median(run: MeasuredRun, plan: Plan) -> None:
    assert run.step_s == pytest.approx(0.025)
    assert run.steps_s == (0.03, 0.01, 0.02, 0.05), "in the order in which they were measured"
    assert (run.torch, run.n_threads) == (torch.__version__, plan.n_threads)


def test_a_plan_and_a_run_are_told_apart_by_what_is_in_them(run: MeasuredRun, tmp_path: Path) -> None:
    run.save(tmp_path / "a.json")
    run.plan.save(tmp_path / "b.json")
    assert read_plan(tmp_path / "a.json") == (run.plan, run)
    assert read_plan(tmp_path / "b.json") == (run.plan, None)
    with pytest.raises(PlanError, match=r"b\.json: \$\.format: this version reads format 1 of runs, got 6"):
        read_run(tmp_path / "b.json")


def span(value: Any, op: str) -> Any:
    return next(one for one in value["timeline"]["spans"] if one["op"] == op)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: run.update(format=2), r"\$\.format: this version reads format 1"),
        (lambda run: run.update(unknown=1), r"\$\.unknown: unknown key"),
        (lambda run: run.pop("steps_s"), r"\$\.steps_s: missing key"),
        (lambda run: run.pop("plan"), r"\$\.plan: missing key"),
        (lambda run: run.update(plan=None), r"\$\.plan: expected an object"),
        (lambda run: run["plan"].update(format=1), r"\$\.plan\.format: this version reads format"),
        (lambda run: run["plan"]["stages"][1].update(index=3), r"\$\.plan\.stages\[1\]\.index: expected 1"),
        (lambda run: run.update(steps_s=[]), r"\$\.steps_s: a run has at least one step"),
        (lambda run: run["steps_s"].append(0), r"\$\.steps_s\[4\]: expected seconds above 0"),
        (lambda run: run["steps_s"].append(float("nan")), r"\$\.steps_s\[4\]: expected a finite number"),
        (lambda run: run.update(steps_s="__import__('os')"), r"\$\.steps_s: expected an array"),
        (lambda run: run.update(n_threads=0), r"\$\.n_threads: expected at least 1"),
        (lambda run: run.update(torch=2), r"\$\.torch: expected a string"),
        (lambda run: run["timeline"].update(source="simulated"), r"\$\.timeline\.source: expected 'measured'"),
        (lambda run: run["timeline"].update(n_workers=10**9), r"\$\.timeline\.n_workers: the plan has 4 workers"),
        (lambda run: run["timeline"].update(spans=[]), r"\$\.timeline\.spans: stage 0 computes no forward"),
        (lambda run: span(run, "F").update(op="<script>"), r"spans\[\d+\]\.op: expected one of B, F"),
        (lambda run: span(run, "F").update(stage=2), r"spans\[\d+\]\.stage: there are 2 stages"),
        (lambda run: span(run, "F").update(stage=-1), r"spans\[\d+\]\.stage: there are 2 stages"),
        (lambda run: span(run, "F").update(microbatch=4), r"spans\[\d+\]\.microbatch: there are 4 microbatches"),
        (lambda run: span(run, "B").update(microbatch=-1), r"spans\[\d+\]\.microbatch: there are 4 microbatches"),
        (lambda run: span(run, "F").update(worker=3), r"spans\[\d+\]\.worker: expected 0, got 3"),
        (lambda run: span(run, "F").update(start_s=-1.0), r"spans\[\d+\]: expected 0 <= start_s <= end_s"),
        (lambda run: span(run, "F").update(end_s=0.0), r"spans\[\d+\]: expected 0 <= start_s <= end_s"),
        (lambda run: run["timeline"]["spans"].append(dict(span(run, "B"))), r"spans\[\d+\]: B\d\.\d is there twice"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    run: MeasuredRun, tmp_path: Path, damage: Callable[[Any], Any], said: str
) -> None:
    value = copy.deepcopy(json.loads(json.dumps(to_json(run))))
    damage(value)
    with pytest.raises(PlanError, match=said):
        parse_run(value)
    (tmp_path / "bad.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match=r"bad\.json: "):
        read_plan(tmp_path / "bad.json")


def test_the_spans_of_a_reduction_belong_to_all_replicas(run: MeasuredRun) -> None:
    reductions = [one for one in run.timeline.spans if one.op == "reduce"]
    assert {one.worker for one in reductions if one.stage == 1} == {2, 3}, "the plan has replicas"
    moved = tuple(replace(one, worker=0) if one in reductions else one for one in run.timeline.spans)
    timeline = Timeline("measured", 4, moved)
    with pytest.raises(PlanError, match=r"worker: expected 2 or 3, got 0"):
        parse_run(to_json(replace(run, timeline=timeline)))


def test_a_file_that_is_no_json_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    for name in ("bad.json", "missing.json"):
        with pytest.raises(PlanError, match=name):
            read_plan(tmp_path / name)
