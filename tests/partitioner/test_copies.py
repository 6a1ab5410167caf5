"""Ops that the consuming stage computes again: where that is cheaper, and exact."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import stagecut
from stagecut.errors import PlanError
from stagecut.partitioner.copies import choose_copies, cone
from stagecut.partitioner.opgraph import OpNode
from stagecut.partitioner.plan import parse
from stagecut.records import to_json


def ops(**inputs: tuple[str, ...]) -> dict[str, OpNode]:
    return {
        name: OpNode(
            name=name, target="f", module_path="", source=None, inputs=used, parameters=(), output_bytes=8,
            saved_bytes=0, differentiable=True,
        )
        for name, used in inputs.items()
    }  # fmt: skip


GRAPH = ops(a=("x",), b=("a",), c=("b",), d=("c", "b"))


def test_a_cone_reaches_back_to_what_is_there() -> None:
    assert cone("b", GRAPH, {"a", "b"}, lambda name: False) == (["b", "a"], [])
    assert cone("b", GRAPH, {"b"}, lambda name: False) == (["b"], ["a"])
    assert cone("b", GRAPH, {"a", "b"}, lambda name: name == "a") == (["b"], [])


@pytest.mark.parametrize(("compute_s", "copies"), [(0.1, {"a": (1,), "b": (1,)}), (0.6, {})])
def test_what_is_cheaper_than_its_wire_is_computed_again(compute_s: float, copies: dict) -> None:
    stage_of = {"a": 0, "b": 0, "c": 0, "d": 1}
    chosen = choose_copies(
        GRAPH, stage_of, {"b": (1,), "c": (1,)}, {"a", "b"}, lambda name: 1.0, lambda name, stage: compute_s
    )
    assert chosen == copies


def test_an_op_with_one_more_wire_is_only_worth_it_if_that_wire_is_smaller() -> None:
    stage_of = {"a": 0, "b": 0, "c": 0, "d": 1}
    sizes = {"a": 0.4, "b": 1.0, "c": 1.0}
    chosen = choose_copies(GRAPH, stage_of, {"b": (1,), "c": (1,)}, {"b"}, sizes.__getitem__, lambda name, stage: 0.1)
    assert chosen == {"b": (1,)}
    sizes["a"] = 0.95
    assert not choose_copies(GRAPH, stage_of, {"b": (1,), "c": (1,)}, {"b"}, sizes.__getitem__, lambda n, s: 0.1)


class Masked(nn.Module):
    """A table made of the input alone, used by every layer: sending it costs more than making it."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = (x > 0).to(x.dtype).repeat(1, 1) * 0.5
        for layer in self.layers:
            x = layer(x) * table
        return x


def plan_of(model: nn.Module, x: torch.Tensor) -> stagecut.Plan:
    return stagecut.plan(model, "sim:2xL4", example_inputs=(x,), stages=2, microbatches=2)


def test_a_table_made_of_inputs_does_not_cross() -> None:
    made = plan_of(Masked(), torch.randn(8192, 256))
    again = {op.name for op in made.ops if op.copies}
    assert again
    assert not again & {wire.value for wire in made.wires}
    assert parse(to_json(made)) == made


def test_copies_leave_results_and_gradients_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = Masked().double(), torch.randn(24, 256, dtype=torch.float64)
    made = plan_of(model, torch.randn(8192, 256, dtype=torch.float64))
    assert any(op.copies for op in made.ops)
    on_cpu = replace(made, stages=tuple(replace(stage, devices=("cpu",)) for stage in made.stages))
    plain = copy.deepcopy(model)
    loss = sum(plain(part).square().sum() / 24 for part in x.chunk(2))
    loss.backward()
    with stagecut.compile(
        model,
        [["cpu"], ["cpu"]],
        plan=on_cpu,
        launch="inline",
        loss_fn=lambda out, y: out.square().sum() / out.shape[0],
    ) as pm:
        assert torch.allclose(pm.step(x).loss, loss, rtol=1e-12)
    for (name, own), other in zip(model.named_parameters(), plain.parameters()):
        assert torch.allclose(own.grad, other.grad, rtol=1e-10, atol=1e-14), name


def test_a_copy_on_an_earlier_stage_is_refused() -> None:
    made = plan_of(Masked(), torch.randn(16, 256))
    last = made.ops[-1]
    broken = replace(made, ops=(*made.ops[:-1], replace(last, copies=(0,))))
    with pytest.raises(PlanError, match=r"copies\[0\].*copies are on later stages"):
        parse(to_json(broken))
