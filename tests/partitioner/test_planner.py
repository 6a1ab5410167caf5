"""The planner: what comes out adds up, fits, is the best of what was tried, and says why; what cannot be is refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from dag_models import random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from score_cut import score_cut
from score_plan import score_plan
from torch import nn

import stagecut
from stagecut.errors import ConstraintError, DeviceError, InfeasibleError, StagecutError
from stagecut.partitioner.capture import capture
from stagecut.partitioner.describe import describe
from stagecut.partitioner.plan import parse
from stagecut.partitioner.pricing import Pricer
from stagecut.records import to_json

MIXED = "sim:2xA100-80GB+2xV100-32GB"
DEVICES = (["cpu"], ["cpu"] * 2, ["cpu"] * 3, ["cpu"] * 4, "sim:4xA100-80GB", "sim:2x2xA100-40GB", MIXED)
property_test = settings(max_examples=5, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plan(model: nn.Module, devices: Any, x: torch.Tensor, **wishes: Any) -> stagecut.Plan:
    return stagecut.plan(model, devices, example_inputs=(x,), costs="analytic", **wishes)


def chain(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def on_meta(depth: int, width: int = 4096) -> tuple[nn.Sequential, torch.Tensor]:
    """Return a chain whose layers take long enough for pipelines to pay."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))), torch.empty(128, width)


wishes_for = st.fixed_dictionaries(
    {},
    optional={
        "stages": st.integers(1, 4),
        "microbatches": st.sampled_from([1, 2, 3, 7]),
        "schedule": st.sampled_from(["1f1b", "fill-drain"]),
        "recompute": st.booleans(),
    },
)


def sound(made: stagecut.Plan, devices: Any) -> None:
    assert score_plan(made, one_kind=devices != MIXED).faults == ()
    assert parse(json.loads(json.dumps(to_json(made)))) == made
    assert len(set(made.reasons)) == len(made.reasons)


@property_test
@given(st.integers(0, 10_000), st.sampled_from(DEVICES), wishes_for, st.sampled_from([None, 0.9, 0.7, 0.5, 0.3]))
def test_a_plan_adds_up_whatever_was_wished_for(seed: int, devices: Any, wishes: Any, share: float | None) -> None:
    model, args, kwargs = random_problem(seed)

    def make(**more: Any) -> stagecut.Plan:
        return stagecut.plan(model, devices, example_inputs=args, example_kwargs=kwargs, costs="analytic", **more)

    try:
        made = make(**wishes)
        sound(made, devices)
        if share is not None:
            wishes["memory_bytes"] = share * max(stage.memory_bytes for stage in made.stages)
            made = make(**wishes)
            sound(made, devices)
    except StagecutError as error:
        refused_for_a_reason(error, wishes)
        return
    if "stages" in wishes:
        assert len(made.stages) == wishes["stages"]
    if "microbatches" in wishes:
        assert made.n_microbatches == wishes["microbatches"]
    assert made.schedule == wishes.get("schedule", made.schedule)
    for stage in made.stages:
        if "recompute" in wishes:
            assert stage.recompute == wishes["recompute"]
        elif stage.recompute:
            plain = stage.memory_bytes - stage.held_bytes + stage.in_flight * stage.saved_bytes + stage.workspace_bytes
            assert plain > stage.memory_limit_bytes
    if "stages" not in wishes:
        assert all(made.prediction.step_s <= other.step_s for other in made.alternatives)


def refused_for_a_reason(error: StagecutError, wishes: dict[str, Any]) -> None:
    assert isinstance(error, (InfeasibleError, ConstraintError))
    text = str(error)
    if isinstance(error, ConstraintError):
        assert "stages" in text
    elif "memory_bytes" in wishes and "were asked for" not in text:
        assert re.search(r"[\d,]+ more than its [\d,]+|state need [\d,]+ bytes", text), text
        assert error.hint is not None
    else:
        assert re.search(r"\d stages were asked for, but the graph has \d", text), text


def test_the_check_of_plans_finds_what_is_wrong_with_one() -> None:
    model, x = on_meta(4)
    made = plan(model, "sim:2xA100-80GB", x, stages=2, microbatches=4)
    sound(made, "sim")
    longer, x = on_meta(6)
    three = plan(longer, "sim:3xA100-80GB", x, stages=3, microbatches=4)
    first, second = made.stages
    wire, p = made.wires[0], made.prediction
    wrong = {
        "does not get there": replace(made, wires=()),
        "crosses twice": replace(made, wires=(wire, wire)),
        "which does not need it": replace(
            three, wires=(*three.wires, replace(three.wires[0], value=three.ops[0].name))
        ),
        "the wire of": replace(made, wires=(replace(wire, n_bytes=1),)),
        "and its ops": replace(made, stages=(replace(first, forward_s=1.0), second)),
        "in flight": replace(made, stages=(replace(first, in_flight=1), second)),
        "of state": replace(made, stages=(replace(first, memory_bytes=0), second)),
        "needs": replace(made, stages=(replace(first, memory_limit_bytes=1.0), second)),
        "called optimal": replace(made, prediction=replace(p, lower_bound_s=p.bottleneck_s / 2, optimal=True)),
        "above the bottleneck": replace(made, prediction=replace(p, lower_bound_s=2 * p.bottleneck_s)),
        "were predicted": replace(made, prediction=replace(p, step_s=p.step_s * 1.001)),
        "a bubble of": replace(made, prediction=replace(p, bubble=p.bubble + 0.01)),
        "of stage 0 uses": replace(made, ops=(replace(made.ops[0], stage=1), *made.ops[1:])),
    }
    for words, bad in wrong.items():
        assert any(words in fault for fault in score_plan(bad).faults), words


@property_test
@given(st.integers(0, 10_000), st.sampled_from([(1, 1), (2, 1), (1, 2), (1, 1, 1), (3, 1), (1, 3), (2, 2)]))
def test_fixed_replicas_add_up(seed: int, sizes: tuple[int, ...]) -> None:
    model, args, kwargs = random_problem(seed)
    for devices in (["cpu"] * sum(sizes), f"sim:{sum(sizes)}xA100-80GB"):
        made = stagecut.plan(
            model, devices, example_inputs=args, example_kwargs=kwargs, costs="analytic", replicas=sizes
        )
        assert tuple(len(stage.devices) for stage in made.stages) == sizes
        sound(made, devices)


@pytest.mark.parametrize("stages", [None, 2, 4])
def test_one_device_and_plain_data_parallelism_are_always_compared_with(stages: int | None) -> None:
    model, x = on_meta(8)
    made = plan(model, "sim:4xA100-80GB", x, stages=stages)
    shapes = {tuple(len(stage.devices) for stage in made.stages)} | {other.replicas for other in made.alternatives}
    assert {(1,), (4,)} <= shapes
    text = "\n".join(made.reasons)
    assert "one device: " in text
    assert "data parallel on 4 devices: " in text


def test_reasons_name_the_next_best_the_bottleneck_and_what_would_help() -> None:
    model, x = on_meta(8)
    made = plan(model, "sim:4xA100-80GB", x)
    assert len(made.devices) == 4
    assert made.reasons[0].startswith("next best: ")
    assert f"{min(other.step_s for other in made.alternatives) * 1e3:.3g} ms a step" in made.reasons[0]
    cut = next(line for line in made.reasons if line.startswith("cut: "))
    slowest = max(made.stages, key=lambda stage: stage.forward_s + stage.backward_s).index
    assert f"{made.prediction.bottleneck_s * 1e3:.3g} ms a microbatch" in cut
    assert cut.endswith(f"stage {slowest} computes longest")
    assert any(line.startswith("would help: twice the microbatches") for line in made.reasons)


def test_recompute_is_said_to_be_asked_for_where_it_was() -> None:
    model, x = on_meta(4)
    asked = plan(model, "sim:2xA100-80GB", x, recompute=True)
    assert all(stage.recompute for stage in asked.stages)
    assert any(re.match(r"recompute on stage .*as was asked for$", line) for line in asked.reasons)


def test_equal_calls_give_equal_plans() -> None:
    model, args, kwargs = random_problem(1)
    made, again = (
        stagecut.plan(model, "sim:4xA100-80GB", example_inputs=args, example_kwargs=kwargs) for _ in range(2)
    )
    assert made == again


SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import stagecut
from stagecut.records import to_json
from dag_models import random_problem
for seed in (1, 2):
    model, args, kwargs = random_problem(seed)
    made = stagecut.plan(model, "sim:4xA100-80GB", example_inputs=args, example_kwargs=kwargs)
    print(json.dumps(to_json(made)))
"""


def test_other_processes_with_other_hashes_make_the_same_plans() -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *sys.path])
    given = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("0", "12345")
    ]  # fmt: skip
    assert given[0] == given[1]
    assert len(given[0].splitlines()) == 2


def test_memory_limits_are_met_and_tighter_ones_cost_time() -> None:
    """Ever tighter limits: other stages, then recompute, then nothing, with what would have been enough."""
    model = chain(64, 64, 64, 64, 64, 64, 64, 64, 2)
    x = torch.randn(2048, 64)
    limit, steps, seen = 2.0**40, [], set()
    while True:
        try:
            made = plan(model, "sim:4xA100-80GB", x, memory_bytes=limit, microbatches=4)
        except InfeasibleError as error:
            needed = int(re.search(r"raise memory_bytes by ([\d,]+)", str(error)).group(1).replace(",", ""))
            assert plan(model, "sim:4xA100-80GB", x, memory_bytes=limit + needed, microbatches=4)
            break
        sound(made, "sim")
        largest = max(stage.memory_bytes for stage in made.stages)
        assert largest <= limit
        steps.append(made.prediction.step_s)
        seen.add((len(made.stages), any(stage.recompute for stage in made.stages)))
        limit = 0.9 * largest
    assert steps == sorted(steps)
    assert {again for _, again in seen} == {False, True}
    assert len({stages for stages, _ in seen}) > 1


@pytest.mark.parametrize("seed", range(12))
def test_the_cut_of_a_tiny_model_is_the_best_of_all(seed: int) -> None:
    model, args, kwargs = random_problem(seed, max_ops=4)
    n_stages = 2 + seed % 2
    devices = f"sim:{n_stages}xA100-80GB"
    captured = capture(model, args, kwargs)
    tensors = [*args, *(kwargs["extra"]["more"] if kwargs else [])]
    graph = Pricer(captured, tensors, describe(devices), "analytic").at(args[0].shape[0]).graph
    best = min(bottlenecks(graph, n_stages), default=None)

    def make() -> stagecut.Plan:
        return stagecut.plan(
            model, devices, example_inputs=args, example_kwargs=kwargs, stages=n_stages, microbatches=1, schedule="1f1b"
        )

    if best is None:
        with pytest.raises(InfeasibleError, match="were asked for, but the graph has"):
            make()
        return
    made = make()
    assert made.prediction.bottleneck_s == pytest.approx(best, rel=1e-9)
    assert made.prediction.optimal


def bottlenecks(graph: nx.DiGraph, n_stages: int) -> Iterator[float]:
    """Score every convex assignment, by trying all."""
    kind = next(iter(next(iter(graph.nodes.values()))["compute_s"]))
    devices = [{"name": f"d{s}", "kind": kind} for s in range(n_stages)]
    names = list(graph)
    for stages in itertools.product(range(n_stages), repeat=len(names)):
        if len(set(stages)) == n_stages:
            score = score_cut(graph, devices, dict(zip(names, stages)), [d["name"] for d in devices])
            if not score.faults:
                yield score.max_load


@pytest.mark.parametrize("devices", ["sim:4xA100-80GB", "sim:2x8xA100-80GB", MIXED])
def test_a_model_without_memory_is_planned_for_devices_that_are_not_there(devices: str) -> None:
    model, x = on_meta(8)
    made = stagecut.plan(model, devices, example_inputs=(x,))
    sound(made, devices)
    assert made.prediction.cost_source == "analytic"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_several_stages_are_made_where_one_device_is_too_small() -> None:
    model, x = on_meta(8)
    made = plan(model, "sim:4xA100-80GB", x, memory_bytes=700e6)
    sound(made, "sim")
    assert len(made.devices) == 4
    assert len(made.stages) >= 4
    assert any(re.match(r"did not fit: one device: .* state need 2,148,\S+ bytes", line) for line in made.reasons)


def test_a_choice_of_the_planner_leaves_out_what_the_model_refuses() -> None:
    """BatchNorm refuses single rows, so replicas are out, and they are no reason to fail."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for wishes in ({}, {"stages": 2}, {"microbatches": 1}, {"microbatches": 1, "stages": 2}):
        made = plan(model, ["cpu"] * 2, torch.randn(2, 4), **wishes)
        assert made.n_microbatches == 1
        assert max(len(stage.devices) for stage in made.stages) == 1
        assert any("the model refuses it: ValueError: Expected more than 1 value" in line for line in made.reasons)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        plan(model, ["cpu"] * 2, torch.randn(2, 4), microbatches=2, stages=2)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).reshape(8, 4)[torch.arange(8)])


REFUSED: dict[str, tuple[dict[str, Any], type[StagecutError], str]] = {
    "schedule": (
        {"schedule": "gpipe"},
        ConstraintError,
        "schedule must be one of 1f1b, fill-drain, .*, dualpipe-v, search, auto, or a file, got 'gpipe'",
    ),
    "half a schedule": ({"schedule": "forward-only"}, ConstraintError, "schedule must be one of 1f1b, fill-drain"),
    "more stages than devices": ({"stages": 3}, ConstraintError, "the number of devices, 2, or go .*; got 3"),
    "no stages": ({"stages": 0}, ConstraintError, "got 0"),
    "no microbatches": ({"microbatches": 0}, ConstraintError, "microbatches must be at least 1, got 0"),
    "no threads": ({"threads_per_worker": 0}, ConstraintError, "threads_per_worker must be at least 1, got 0"),
    "no memory": ({"memory_bytes": 0}, DeviceError, "memory_bytes must be positive, got 0"),
    "little memory": (
        {"memory_bytes": 100},
        InfeasibleError,
        r"the closest one, 2 stages under 1f1b in \d microbatch\w*, puts \d+ bytes on stage \d on cpu, "
        r"\d+ more than its 100\n  try: raise memory_bytes by \d+",
    ),
    "no kind of stages": (
        {"devices": MIXED, "stages": 3},
        ConstraintError,
        r"4 devices \(A100-80GB, V100-32GB\) do not divide into 3 stages",
    ),
    "no division": ({"devices": "sim:16xA100-80GB", "stages": 3}, ConstraintError, "do not divide into 3 stages"),
    "more stages than ops": (
        {"devices": ["cpu"] * 4, "stages": 4},
        InfeasibleError,
        "4 stages were asked for, but the graph has 2",
    ),
    "unequal stages": (
        {"devices": ["cpu"] * 3, "stages": 2, "memory_bytes": 300},
        InfeasibleError,
        r"2 stages of unequal replicas: no cut fits in memory: .* 148 more than its 300.*\n.*raise memory_bytes by 148",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_what_is_wrong(case: str) -> None:
    wishes, kind, words = REFUSED[case]
    wishes = {"devices": ["cpu"] * 2, **wishes}
    with pytest.raises(kind, match=words):
        plan(chain(4, 4, 4), wishes.pop("devices"), torch.randn(8, 4), **wishes)


@pytest.mark.parametrize("wishes", [{"microbatches": 2}, {"replicas": 2}])
def test_pieces_of_a_batch_that_cannot_be_cut_are_refused(wishes: dict[str, int]) -> None:
    with pytest.raises(ConstraintError, match="batches of 8 rows only, so neither microbatches nor replicas"):
        plan(Fixed(), ["cpu"] * 2, torch.randn(8, 4), **wishes)
    sound(plan(Fixed(), ["cpu"] * 2, torch.randn(8, 4), stages=2), ["cpu"] * 2)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ConstraintError, match="the example batch has no rows"):
        plan(chain(4, 4), ["cpu"], torch.randn(0, 4))
