"""Stages that both contestants of the benchmarks run: what crosses a cut, which cuts are chosen, what a stage takes."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from even_stages import EvenStages, crossings
from same_stages import Stages, seconds_of_parts, sendable, timeline

import stagecut
from stagecut.partitioner.loss import Loss
from stagecut.partitioner.opgraph import OpNode


def op(name: str, inputs: tuple[str, ...]) -> OpNode:
    return OpNode(name, "f", "", None, inputs, (), 4, 4, True)


@st.composite
def chains(draw: st.DrawFn) -> list[OpNode]:
    """Ops of which each uses some earlier ones, or the input ``x``."""
    ops: list[OpNode] = []
    for i in range(draw(st.integers(3, 9))):
        known = ["x", *(earlier.name for earlier in ops)]
        more = draw(st.lists(st.sampled_from(known), max_size=2))
        ops.append(op(f"op{i}", tuple(dict.fromkeys([known[-1], *more]))))
    return ops


@given(chains())
def test_a_value_crosses_a_place_between_where_it_is_made_and_where_it_is_used(ops: list[OpNode]) -> None:
    result = ops[-1].name
    crossing = crossings({own.name: own for own in ops}, frozenset([result]))
    assert len(crossing) == len(ops) + 1
    for place, names in enumerate(crossing):
        before = {"x", *(own.name for own in ops[:place])}
        after = {name for own in ops[place:] for name in own.inputs} | {result}
        assert names == before & after


@given(chains(), st.data())
def test_one_cut_is_the_best_of_those_that_are_allowed(ops: list[OpNode], data: st.DataObject) -> None:
    times = data.draw(st.lists(st.integers(1, 9).map(float), min_size=len(ops), max_size=len(ops)))
    crossing = crossings({own.name: own for own in ops}, frozenset([ops[-1].name]))
    stages = EvenStages(crossing, range(1, len(ops)), times)
    assume(stages.narrow(2))

    def step_s(places: list[int]) -> float:
        return max(sum(times[: places[0]]), sum(times[places[0] :]))

    for narrow in (False, True):
        (place,) = stages.search(2, step_s, narrow=narrow)
        allowed = [p for p in range(1, len(ops)) if "x" not in crossing[p] and stages.fits([p])]
        allowed = [p for p in allowed if len(crossing[p]) == 1 or not narrow]
        assert step_s([place]) <= min((step_s([p]) for p in allowed), default=float("inf"))
        assert "x" not in crossing[place]
        assert len(crossing[place]) == 1 or not narrow


def test_no_value_goes_past_the_next_stage_and_no_stage_is_left_with_little() -> None:
    ops = [op("a", ("x",)), op("b", ("a",)), op("c", ("b", "a")), op("d", ("c", "a")), op("e", ("d",)), op("f", ("e",))]
    stages = EvenStages(crossings({own.name: own for own in ops}, frozenset("f")), range(1, 6), [1.0] * 6)
    assert stages.fits([1, 4])
    assert not stages.fits([2, 3])  # a would cross both
    assert not stages.fits([1, 5, 5])
    assert not EvenStages(stages.crossing, range(1, 6), [0.1, 1, 1, 1, 1, 1]).fits([1, 4])


def test_with_too_few_places_it_says_so() -> None:
    ops = [op("a", ("x",)), op("b", ("a",))]
    stages = EvenStages(crossings({own.name: own for own in ops}, frozenset("b")), [1], [1.0, 1.0])
    with pytest.raises(ValueError, match="no 2 places"):
        stages.search(3, lambda places: 1.0, narrow=False)


@pytest.mark.parametrize(("schedule", "n", "bubble"), [("fill-drain", 4, 1 / 5), ("1f1b", 8, 1 / 9)])
def test_equal_stages_leave_the_bubble_of_the_schedule(schedule: str, n: int, bubble: float) -> None:
    assert timeline(schedule, ((0,), (1,)), n)([(1.0, 2.0, 1.0)] * 2).bubble == pytest.approx(bubble)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.second(torch.relu(self.first(x)))
        return result


@pytest.mark.parametrize("schedule", ["looped-breadth-first", "interleaved-zero-bubble"])
def test_the_stages_one_after_the_other_are_the_model(schedule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(6)))
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    stages = Stages(model, x, 4, Loss(nn.functional.mse_loss, y, 8))
    plan = stages.plan(((0,), (1,), (0,), (1,)), schedule, 2)
    modules = stages.modules(plan)
    assert len(modules) == 4
    values: tuple[torch.Tensor, ...] = (x,)
    for module in modules:
        found = module(*values)
        values = found if isinstance(found, tuple) else (found,)
    assert torch.equal(values[0], model(x))
    assert plan.stages[-1].backward_s > sum(op.backward_s for op in plan.ops if op.stage == 3)  # the loss is there
    if schedule == "interleaved-zero-bubble":
        assert all(len(before.results) == 1 == len(after.names) for before, after in pairwise(modules))


def test_stages_for_any_schedule_pass_one_value_and_take_nearly_equal_times() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(6)))
    x = torch.randn(8, 16)
    stages = Stages(model, x, 4)
    modules = stages.equal(3)
    assert len(modules) == 3
    assert all(len(before.results) == 1 == len(after.names) for before, after in pairwise(modules))
    assert torch.equal(nn.Sequential(*modules)(x), model(x))
    with pytest.raises(ValueError, match="not enough for 40 stages"):
        stages.equal(40)


def test_a_view_and_a_value_with_strides_of_its_own_are_not_sent() -> None:
    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            whole = x * 2
            turned = whole.transpose(0, 1)
            copied = turned * 3
            again = copied.contiguous() * 2
            result: torch.Tensor = again.relu()
            return result

    model = nn.Sequential(nn.Linear(3, 3), Turned())
    captured = stagecut.capture(model, (torch.randn(4, 3),))
    names = sendable(captured.graph_module, torch.randn(4, 3))
    values = [node.name for node in captured.graph_module.graph.nodes if node.op not in ("placeholder", "output")]
    assert values == ["_0", "mul", "transpose", "mul_1", "contiguous", "mul_2", "relu"]
    assert names == {"_0", "mul", "contiguous", "mul_2", "relu"}


def test_every_part_is_timed() -> None:
    parts = [nn.Linear(16, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 4))]
    taken = seconds_of_parts(parts, torch.randn(8, 16))
    assert len(taken) == 2
    assert all(forward > 0 and backward > 0 for forward, backward in taken)


def test_timing_leaves_no_gradients_and_no_statistics_in_the_model() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Stages(model, torch.randn(8, 16), 4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
