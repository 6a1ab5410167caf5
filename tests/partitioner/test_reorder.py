"""Orders of compute of a plan's own: searched, or read from a file; what they hold, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from score_plan import score_plan
from torch import nn

import stagecut
from stagecut.errors import ConstraintError, InfeasibleError, PlanError
from stagecut.partitioner.describe import describe
from stagecut.partitioner.plan import parse
from stagecut.partitioner.reorder import costs_of, least_s, searched, with_orders
from stagecut.partitioner.residency import memory_over_time
from stagecut.partitioner.scheduling import family_schedule
from stagecut.partitioner.scheduling.files import to_csv
from stagecut.records import to_json
from stagecut.runtime.program import chrome_trace
from stagecut.runtime.schedules import GIVEN, SEARCH, schedule
from stagecut.runtime.schedules.tokens import actions_of

SIM = "sim:3xA100-80GB"


def uneven(*repeats: int) -> nn.Module:
    """Layers of different times, so that no published order fits them."""
    return nn.Sequential(*(nn.Sequential(*(nn.Linear(64, 64) for _ in range(n)), nn.Tanh()) for n in repeats))


def plan_of(model: nn.Module, devices: Any = SIM, rows: int = 36, **wishes: Any) -> stagecut.Plan:
    wishes = {"costs": "analytic", **wishes}
    return stagecut.plan(model, devices, example_inputs=(torch.randn(rows, 64),), **wishes)


def pipeline(**wishes: Any) -> stagecut.Plan:
    return plan_of(uneven(3, 1, 4, 1, 5, 2), replicas=1, microbatches=6, **wishes)


@pytest.mark.parametrize("stages", [3, 6])
def test_a_searched_order_is_no_slower_than_any_published_one_on_the_same_cut(stages: int) -> None:
    wishes = {"replicas": 1} if stages == 3 else {"stages": stages}
    plan = plan_of(uneven(3, 1, 4, 1, 5, 2), microbatches=6, schedule="search", **wishes)
    published = plan_of(uneven(3, 1, 4, 1, 5, 2), microbatches=6, **wishes)
    assert plan.schedule == SEARCH
    assert len(plan.stages) == stages
    assert plan.prediction.step_s <= published.prediction.step_s * (1 + 1e-9)
    assert plan.prediction.step_s >= least_s(plan)
    assert not score_plan(plan).faults
    assert parse(json.loads(json.dumps(to_json(plan)))) == plan


def test_the_same_search_gives_the_same_plan() -> None:
    assert pipeline(schedule="search") == pipeline(schedule="search")


def test_replicas_do_the_same_with_microbatches_of_their_own() -> None:
    plan = plan_of(uneven(3, 1, 4, 1), "sim:4xA100-80GB", replicas=2, microbatches=3, schedule="search")
    assert [stage.workers for stage in plan.stages] == [(0, 1), (2, 3)]
    assert len(plan.orders) == 2
    assert not score_plan(plan).faults


def test_an_order_is_searched_within_the_memory_of_the_devices() -> None:
    free = pipeline(schedule="zb-h2")
    limit = 0.98 * max(stage.device_bytes for stage in free.stages)
    tight = pipeline(schedule="search", memory_bytes=limit)
    assert max(stage.device_bytes for stage in tight.stages) <= limit
    assert not score_plan(tight).faults


def test_the_costs_of_a_search_are_those_of_the_simulator() -> None:
    """On one chain, without copies and skips, both clocks agree on a published order."""
    plan = pipeline(schedule="zb-h1")
    costs = replace(costs_of(plan, True), memory_bytes=None)
    assert family_schedule("zb-h1", costs, 6).makespan_s == pytest.approx(plan.prediction.step_s, rel=0.01)


def test_the_planner_searches_unasked_where_it_pays() -> None:
    """Layers of different times, on devices that cannot hold the model alone: an own order is 3 % faster."""
    layers = [nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(n)), nn.Tanh()) for n in (1, 1, 2, 1, 1, 3, 1, 1)]
    model, x = nn.Sequential(*layers).to("meta"), torch.empty(2048, 4096, device="meta")
    plan = stagecut.plan(model, "sim:4xA100-80GB", example_inputs=(x,), memory_bytes=1.2e9)
    assert plan.schedule == SEARCH
    assert plan.prediction.step_s < 0.99 * min(other.step_s for other in plan.alternatives if other.schedule != SEARCH)
    assert max(stage.device_bytes for stage in plan.stages) <= 1.2e9
    assert not score_plan(plan).faults


def test_a_search_that_cannot_be_says_why() -> None:
    with pytest.raises(ConstraintError, match="as many replicas of every stage, and at most 20,000 computations"):
        plan_of(uneven(3, 1, 4), "sim:3xA100-80GB", replicas=[2, 1], microbatches=2, schedule="search")


def test_nothing_is_searched_where_there_is_no_choice() -> None:
    assert searched(plan_of(uneven(1), ["cpu"]), 1.0) is None
    assert searched(plan_of(uneven(3, 1, 4), "sim:3xA100-80GB", replicas=[2, 1], microbatches=2), 1.0) is None


@pytest.mark.parametrize("suffix", [".json", ".csv"])
@pytest.mark.parametrize("name", ["1f1b", "zb-v", "interleaved-1f1b"])
def test_an_order_from_a_file_is_run_as_it_stands(tmp_path: Path, name: str, suffix: str) -> None:
    made = plan_of(uneven(3, 1, 4, 1, 5, 2), "sim:2xA100-80GB", replicas=1, microbatches=4, schedule=name)
    orders = schedule(name, made.layout(), 4)
    path = tmp_path / f"order{suffix}"
    tokens = [[f"{a.stage}{a.kind}{a.microbatch}" for a in order] for order in orders]
    path.write_text(to_csv(orders) if suffix == ".csv" else json.dumps({"order": tokens}))
    plan = plan_of(uneven(3, 1, 4, 1, 5, 2), "sim:2xA100-80GB", schedule=path)
    assert plan.schedule == GIVEN
    assert plan.n_microbatches == 4
    assert [stage.workers for stage in plan.stages] == [stage.workers for stage in made.stages]
    assert plan.prediction.step_s == pytest.approx(made.prediction.step_s, rel=1e-9)
    assert [stage.memory_bytes for stage in plan.stages] == [stage.memory_bytes for stage in made.stages]
    assert not score_plan(plan).faults


def test_an_order_on_a_placement_without_a_name(tmp_path: Path) -> None:
    """The first worker has three of four stages; both replicas do the same."""
    path = tmp_path / "odd.csv"
    path.write_text("0F0,1F0,3F0,3B0,1B0,0B0,0F1,1F1,3F1,3B1,1B1,0B1\n2F0,2B0,2F1,2B1\n")
    plan = plan_of(uneven(3, 1, 4, 1), "sim:4xA100-80GB", schedule=str(path))
    assert [stage.workers for stage in plan.stages] == [(0, 1), (0, 1), (2, 3), (0, 1)]
    assert not score_plan(plan).faults


def test_what_a_file_says_must_fit(tmp_path: Path) -> None:
    def asked(text: str, suffix: str = ".csv", **wishes: Any) -> stagecut.Plan:
        path = tmp_path / f"order{suffix}"
        path.write_text(text)
        return plan_of(uneven(3, 1, 4), wishes.pop("devices", "sim:2xA100-80GB"), schedule=path, **wishes)

    plain = "0F0,0B0\n1F0,1B0\n"
    assert asked(plain).n_microbatches == 1
    assert [stage.workers for stage in asked(plain, devices="sim:4xA100-80GB").stages] == [(0, 1), (2, 3)]
    with pytest.raises(ConstraintError, match=r"microbatches=2 was asked for, and the order in .*order.csv has 1"):
        asked(plain, microbatches=2)
    with pytest.raises(ConstraintError, match="for 2 workers and their replicas, and devices are 3"):
        asked(plain, devices="sim:3xA100-80GB")
    with pytest.raises(ConstraintError, match=r"order.csv: line 1, column 2: expected stage, F, B, I or W"):
        asked("0F0,hm\n1F0,1B0\n")
    with pytest.raises(ConstraintError, match="stage 0 on workers 0 and 1"):
        asked("0F0,0B0\n0F1,0B1\n")
    with pytest.raises(PlanError, match=r"stage 1 computes \['F'\] of microbatch 0"):
        asked("0F0,0B0\n1F0\n")
    with pytest.raises(ConstraintError, match="the schedule waits for itself"):
        asked("0B0,0F0\n1F0,1B0\n")
    with pytest.raises(ConstraintError, match="no JSON"):
        asked("{", ".json")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConstraintError, match=r"bytes\.csv: no text"):
        plan_of(uneven(3, 1, 4), schedule=tmp_path / "bytes.csv")
    with pytest.raises(ConstraintError, match="No such file"):
        plan_of(uneven(3, 1, 4), schedule=tmp_path / "nothing.json")


def test_an_order_that_holds_too_much_says_by_how_much(tmp_path: Path) -> None:
    free = plan_of(uneven(3, 1, 4, 1), "sim:2xA100-80GB", replicas=1, microbatches=6, schedule="1f1b")
    tokens = schedule("fill-drain", free.layout(), 6)
    path = tmp_path / "order.csv"
    path.write_text(to_csv(tokens))
    limit = 1.001 * max(stage.device_bytes for stage in free.stages)
    with pytest.raises(InfeasibleError, match=r"the device of stage 0 holds [\d,]+ bytes, [\d,]+ more than its"):
        plan_of(uneven(3, 1, 4, 1), "sim:2xA100-80GB", schedule=path, memory_bytes=limit)


def test_orders_of_a_plan_from_elsewhere_are_checked() -> None:
    plan = plan_of(uneven(3, 1, 4), "sim:2xA100-80GB", replicas=1, microbatches=2, schedule="search")

    def refused(what: str, **changes: Any) -> None:
        with pytest.raises(PlanError, match=what):
            parse(to_json(replace(plan, **changes)))

    first, second = plan.orders
    refused(r"\$.orders: expected 2, one for each worker", orders=(first,))
    refused(r"\$.orders\[0\]\[0\]: 1F0 is of a stage that this worker does not own", orders=(("1F0",), second))
    refused(r"\$.orders\[0\]\[1\]: 0F0 is there twice", orders=(("0F0", "0F0"), second))
    refused(r"\$.orders: stage 0 computes \['F'\] of microbatch 0", orders=(("0F0",), second))
    refused(r"\$.orders\[1\]\[0\]: expected stage, F, B, I or W", orders=(first, ("x",)))
    refused(r"\$.schedule: orders are there, so it must be 'search' or 'given'", schedule="1f1b")
    refused(r"\$.schedule: unknown schedule 'search'", orders=())


def test_a_plan_keeps_what_it_is_but_for_its_order() -> None:
    plan = pipeline(schedule="1f1b")
    again = with_orders(plan, GIVEN, schedule("1f1b", plan.layout(), 6))
    assert again.prediction == plan.prediction
    assert again.stages == plan.stages
    assert actions_of(again.orders) == schedule("1f1b", plan.layout(), 6)


@pytest.mark.parametrize(
    "wishes", [{"schedule": "1f1b"}, {"schedule": "zb-v"}, {"schedule": "zb-h2", "recompute": True}]
)
def test_memory_over_time_peaks_at_what_the_plan_says(wishes: dict[str, Any]) -> None:
    plan = plan_of(uneven(3, 1, 4, 1, 5, 2), "sim:2xA100-80GB", replicas=1, microbatches=6, **wishes)
    for worker, steps in memory_over_time(plan, plan.predicted).items():
        own = [stage for stage in plan.stages if worker in stage.workers]
        state = sum(stage.memory_bytes - stage.held_bytes for stage in own)
        assert steps[0] == (0.0, state)
        assert steps[-1][1] == pytest.approx(state), "nothing stays"
        most = max(n_bytes for _, n_bytes in steps)
        assert most <= own[0].device_bytes
        if len(own) == 1:
            assert most == pytest.approx(own[0].device_bytes)
        assert most >= max(stage.memory_bytes for stage in own)


def test_a_step_as_a_trace_has_every_computation_and_what_is_held() -> None:
    plan = plan_of(uneven(3, 1, 4), "sim:2xA100-80GB", replicas=1, microbatches=3, schedule="zb-h1")
    timeline = plan.predicted
    trace = json.loads(json.dumps(chrome_trace(timeline, memory_over_time(plan, timeline))))
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    computed = sorted(e["name"] for e in slices if e["cat"] in ("forward", "input gradient", "weight gradient"))
    assert computed == sorted(f"{kind}{s}.{m}" for kind in "FIW" for s in range(2) for m in range(3))
    assert max(e["ts"] + e["dur"] for e in slices) == pytest.approx(timeline.makespan_s * 1e6)
    assert {e["name"] for e in trace["traceEvents"] if e["ph"] == "C"} == {"bytes on worker 0", "bytes on worker 1"}


def test_an_optimizers_step_can_be_part_of_the_prediction() -> None:
    """Replicas all step the whole model, stages a part each; seven times the weights' bytes for AdamW."""
    model, x = (
        nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).to("meta"),
        torch.empty(64, 1024, device="meta"),
    )
    wishes: dict[str, Any] = {"example_inputs": (x,), "microbatches": 4}
    for places, more in (({"stages": 1, "replicas": 1}, 1.0), ({"stages": 2, "replicas": 1}, 0.5)):
        devices = f"sim:{places['stages']}xA100-80GB"
        plain = stagecut.plan(model, devices, **places, schedule="1f1b", **wishes)
        stepped = stagecut.plan(model, devices, **places, schedule="1f1b", optimizer="adamw", **wishes)
        trained = sum(p.numel() * 4 for p in model.parameters())
        bandwidth = describe(devices).devices[0].kind.bytes_per_s
        assert stepped.prediction.step_s - plain.prediction.step_s == pytest.approx(
            more * 7 * trained / bandwidth, rel=1e-6
        )
        assert not score_plan(stepped).faults
        assert parse(to_json(stepped)) == stepped
    with pytest.raises(ConstraintError, match="optimizer must be one of sgd, momentum, adamw, got 'adam'"):
        stagecut.plan(model, "sim:2xA100-80GB", optimizer="adam", **wishes)
    with pytest.raises(ConstraintError, match="the optimizer runs in your own process"):
        plan_of(uneven(1, 1), ["cpu", "cpu"], optimizer="sgd")
