"""Costs and schedules in files: read strictly, written so that torch reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch.distributed.pipelining.schedules import _Action, _validate_schedule

from stagecut.errors import ConstraintError
from stagecut.partitioner.scheduling import PipelineCosts, family_schedule, search
from stagecut.partitioner.scheduling.files import (
    chrome_trace,
    costs_from_json,
    orders_from_csv,
    orders_from_json,
    scored_orders,
    to_csv,
    to_json,
)
from stagecut.runtime.instructions import Action
from stagecut.runtime.schedules.families import FAMILIES
from stagecut.runtime.schedules.tokens import from_token, token


def record(p: int = 2, **changes: Any) -> dict[str, Any]:
    ones = [1.0] * p
    fields = {
        "forward_s": ones,
        "backward_input_s": ones,
        "backward_weight_s": ones,
        "activation_bytes": ones,
        "weight_grad_bytes": [0.5] * p,
        "memory_bytes": None,
        "link_s": 0.1,
        "op_overhead_s": 0.01,
        "split_backward": True,
    }
    return {key: value for key, value in {**fields, **changes}.items() if value is not ...}


def test_one_latency_is_for_all_boundaries_and_what_is_left_out_costs_nothing() -> None:
    assert costs_from_json(record(3)).link_s == (0.1, 0.1)
    assert costs_from_json(record(3, link_s=[0.1, 0.2])).link_s == (0.1, 0.2)
    bare = costs_from_json(record(link_s=..., op_overhead_s=..., split_backward=..., memory_bytes=...))
    assert (bare.link_s, bare.op_overhead_s, bare.split_backward, bare.memory_bytes) == ((0.0,), 0.0, True, None)
    assert costs_from_json(record(memory_bytes=[4, None])).memory_bytes == (4.0, float("inf"))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([], r"\$: expected an object, got \[\]"),
        (record(forward_s=...), r"\$.forward_s: expected a list of numbers, got None"),
        (record(forward_s=[1, "2"]), r"\$.forward_s\[1\]: expected a number, got '2'"),
        (record(link_s=True), r"\$.link_s: expected a number, got True"),
        (record(split_backward=1), r"\$.split_backward: expected true or false, got 1"),
        (record(microbatches=4), r"\$.microbatches: unknown key; there are forward_s"),
        (record(op_overhead_s=float("nan")), r"\$.op_overhead_s: expected a number, got nan"),
        (record(activation_bytes=[1, None]), r"\$.activation_bytes\[1\]: expected a number, got None"),
    ],
)
def test_a_fault_is_named_with_its_place(data: Any, why: str) -> None:
    with pytest.raises(ConstraintError, match=why):
        costs_from_json(data)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.placement != "loop"])
def test_a_schedule_that_is_read_back_is_the_same(name: str) -> None:
    made = family_schedule(name, costs_from_json(record(4)), 8)
    answer = json.loads(json.dumps(to_json(made, 0.5)))
    for orders in (orders_from_json(answer), orders_from_json(answer["order"]), orders_from_csv(to_csv(made.orders))):
        again = scored_orders(name, made.problem.costs, orders)
        assert (again.orders, again.ends_s, again.problem) == (made.orders, made.ends_s, made.problem)
    assert answer["makespan_s"] == made.makespan_s
    assert answer["worker_of_stage"] == [owners[0] for owners in made.problem.layout.workers]


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-v", "search"])
def test_torch_reads_what_is_written(name: str) -> None:
    costs = costs_from_json(record(4))
    made = search(costs, 6, 2, time_s=0.1) if name == "search" else family_schedule(name, costs, 6)
    rows = [line.split(",") for line in to_csv(made.orders).splitlines()]
    actions = {rank: [_Action.from_str(text) for text in row] for rank, row in enumerate(rows)}
    assert {rank: [str(action) for action in own] for rank, own in actions.items()} == dict(enumerate(rows))
    _validate_schedule(actions, made.problem.n_workers, costs.n_stages, 6)


def test_torchs_idle_steps_are_left_out() -> None:
    assert orders_from_csv("0F0,,0B0\n,1F0,1B0\n") == (
        (Action("F", 0, 0), Action("B", 0, 0)),
        (Action("F", 1, 0), Action("B", 1, 0)),
    )


def test_a_computation_is_written_as_torch_does() -> None:
    assert token(Action("W", 3, 12)) == "3W12"
    assert from_token(" 3W12 ", "here") == Action("W", 3, 12)
    for text in ("F0", "0X1", "0F", "", "-1F0"):
        with pytest.raises(ConstraintError, match="line 1, column 2: expected stage, F, B, I or W"):
            from_token(text, "line 1, column 2")


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (["0F0,0B0", "0F1,0B1"], "stage 0 is computed by workers 0 and 1"),
        (["", "0F0,0B0,1F0,1B0"], "worker 0 computes nothing"),
        (["0F0,0B0"], r"it orders stages \[0\], and the costs are of 2 stages"),
        (["0F0,0B0,1F0,1B0"], "it is for 1 workers, and memory_bytes has 2"),
    ],
)
def test_orders_of_another_pipeline_are_refused(rows: list[str], why: str) -> None:
    with pytest.raises(ConstraintError, match=why):
        scored_orders("file", costs_from_json(record(memory_bytes=[9, 9])), orders_from_csv("\n".join(rows)))


def test_the_trace_has_every_computation_on_its_worker_in_microseconds() -> None:
    made = family_schedule(
        "zb-h1", PipelineCosts((1.0,) * 2, (1.0,) * 2, (1.0,) * 2, (1.0,) * 2, (0.5,) * 2, (0.0,)), 3
    )
    events = [event for event in chrome_trace(made)["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * 3 * 3
    assert {event["tid"] for event in events} == {0, 1}
    (last,) = [event for event in events if event["name"] == "1F0"]
    assert (last["ts"], last["dur"], last["args"]) == (1e6, 1e6, {"stage": 1, "microbatch": 0})
