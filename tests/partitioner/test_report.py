"""What ``capture.report()`` says: what was kept whole, why, how much that hides, and what to change."""

from __future__ import annotations

import ast
import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from stagecut.models.transformer import GPT
from stagecut.partitioner.advice import advice, is_known
from stagecut.partitioner.capture import Capture, capture
from stagecut.partitioner.folding import fold
from stagecut.partitioner.hidden import Hidden


class Gate(nn.Module):
    """Opaque: 40 parameters, 32 FLOPs a row."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.zeros(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        if y.sum() > 0:
            y = y * self.table[:4]
        return y


class Body(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, x, *args, **kwargs)


def net() -> nn.Sequential:
    """120 parameters and 160 FLOPs a row, of which the gate has 40 and 32."""
    return nn.Sequential(nn.Linear(4, 4), Gate(), nn.Linear(4, 12))


def rows(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(n))


def report_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    return capture(model, args or (rows(),), kwargs).report().splitlines()


def between(function: Callable[..., Any], **attributes: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), Body(function, **attributes), nn.Linear(4, 12))


# --- the headline ----------------------------------------------------------------------------------------------------


def test_a_model_that_was_opened_is_said_to_be() -> None:
    lines = report_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert lines[0] == "Sequential: 2 ops; captured whole, with no opaque modules"
    assert not any("opaque" in line for line in lines[1:])


def test_one_op_is_one_op() -> None:
    assert report_of(nn.Sequential(nn.ReLU()))[0].startswith("Sequential: 1 op; ")


def test_the_headline_counts_opaque_modules() -> None:
    assert (
        report_of(net())[0] == "Sequential: 4 ops; not captured whole, with 1 opaque module that cannot be cut inside"
    )


def test_a_model_that_is_one_op_is_said_to_be() -> None:
    lines = report_of(Gate())
    assert lines[0] == "Gate: 1 op; the whole model is 1 opaque module and cannot be cut"
    assert lines[1] == "  opaque (the whole model) (Gate): it branches on a tensor's data (__bool__)"
    assert "    hides from the cut: 100% of the parameters and 100% of the forward FLOPs" in lines
    assert "  argument x: any shape" in lines


# --- opaque modules --------------------------------------------------------------------------------------------------


def line_of(function: Callable[..., Any], text: str) -> int:
    code = function.__code__
    lines = Path(code.co_filename).read_text().splitlines()[code.co_firstlineno - 1 :]
    return code.co_firstlineno + next(n for n, line in enumerate(lines) if text in line)


def test_an_opaque_module_is_told_with_reason_place_shares_and_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    lines = report_of(net())
    assert lines[1:5] == [
        "  opaque 1 (Gate): it branches on a tensor's data (__bool__)",
        f"    where: {__file__[1:]}:{line_of(Gate.forward, 'if y.sum()')}",
        "    hides from the cut: 33% of the parameters and 20% of the forward FLOPs",
        "    to open it: choose with torch.where instead of if; "
        "or give these lines a function of their own, from tensors to tensors, so that only it is kept whole",
    ]


def test_a_place_elsewhere_is_told_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert any(line.startswith(f"    where: {__file__}:") for line in report_of(net()))


def test_alike_siblings_are_one_entry() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), Gate()) for _ in range(12)])
    lines = report_of(model)
    assert [line for line in lines if "opaque" in line][1:] == [
        "  opaque {0..11}.1 ×12 (Gate): it branches on a tensor's data (__bool__)"
    ]
    # 12 * 40 of 12 * 60 parameters, and half of the matrix products
    assert "    hides from the cut: 67% of the parameters and 50% of the forward FLOPs" in lines
    assert not any("together" in line for line in lines)


def test_other_classes_and_reasons_are_other_entries_with_a_sum() -> None:
    def counts(self: Body, x: torch.Tensor) -> torch.Tensor:
        self.n = self.n + 1
        return self.lin(x)

    lines = report_of(nn.Sequential(Gate(), nn.Linear(4, 4), Gate(), Body(counts, n=0)))
    assert [line.split(":")[0] for line in lines if line.startswith("  opaque")] == [
        "  opaque {0,2} ×2 (Gate)",
        "  opaque 3 (Body)",
    ]
    # 40 + 40 + 20 of 120 parameters, three of four equal products
    assert "  together they hide 83% of the parameters and 75% of the forward FLOPs from the cut" in lines


def test_modules_that_were_asked_for_need_no_change() -> None:
    lines = capture(net(), (rows(),), opaque=["2"]).report().splitlines()
    start = lines.index("  opaque 2 (Linear): asked for")
    # 60 of 120 parameters, 96 of 160 FLOPs
    assert lines[start + 1] == "    hides from the cut: 50% of the parameters and 60% of the forward FLOPs"
    assert not lines[start + 2].startswith("    ")


def test_small_and_large_shares_are_not_rounded_to_nothing_and_all() -> None:
    small = report_of(nn.Sequential(Gate(), nn.Linear(4, 4000)))
    assert "    hides from the cut: under 1% of the parameters and under 1% of the forward FLOPs" in small
    large = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4000)), (rows(),), opaque=["1"]).report()
    assert "over 99% of the parameters and over 99% of the forward FLOPs" in large


def test_the_line_that_changes_an_attribute_is_found() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2 if self.seen == 0 else x
            self.seen += 1
            return y

    lines = report_of(nn.Sequential(nn.Linear(4, 4), Counter()))
    assert any(line.endswith(f":{line_of(Counter.forward, 'self.seen += 1')}") for line in lines)


# --- advice ----------------------------------------------------------------------------------------------------------


def reads_a_number(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) * x.mean().item()


def counts_calls(self: Body, x: torch.Tensor) -> torch.Tensor:
    self.n += 1
    return self.lin(x)


def python_random(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) * random.random()


def numpy_random(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) * float(np.random.rand())


def loops_over_rows(self: Body, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([self.lin(row) for row in x])


def hooks_a_tensor(self: Body, x: torch.Tensor) -> torch.Tensor:
    y = self.lin(x)
    y.register_hook(lambda grad: grad * 2)
    return y


def own_gradients(self: Body, x: torch.Tensor) -> torch.Tensor:
    y = self.lin(x)
    return y + torch.autograd.grad(y.sum(), self.lin.weight, create_graph=True)[0]


@pytest.mark.parametrize(
    ("function", "change"),
    [
        (reads_a_number, "keep the number in the tensor"),
        (counts_calls, "self.register_buffer"),
        (python_random, "torch.rand"),
        (numpy_random, "torch.rand"),
        (loops_over_rows, "over the whole batch at once"),
        (hooks_a_tensor, "torch.autograd.Function"),
        (own_gradients, "torch.autograd.Function"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_advice_depends_on_the_reason(function: Callable[..., Any], change: str) -> None:
    (found,) = (line for line in report_of(between(function, n=0)) if line.startswith("    to open it: "))
    assert change in found


def test_a_branch_on_the_batch_size_has_its_own_advice() -> None:
    assert advice("it branches on the batch size").startswith("do the same for every batch size")
    assert advice("it changes an argument that is not a tensor").startswith("copy the argument")
    assert advice("asked for") == ""
    assert "function of their own" in advice("something that nobody thought of")


def reasons_in(tree: ast.AST) -> list[str]:
    """List the reasons written in the source, with an x where a value is put in."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "TraceRefused", "_refusal", "Misfit", "_misfit", "_keep_whole",
        ):  # fmt: skip
            for text in (*node.args, *(keyword.value for keyword in node.keywords)):
                if isinstance(text, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "x" for part in text.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(text, ast.Constant) and isinstance(text.value, str) and " " in text.value:
                    found.append(text.value)
        elif isinstance(node, ast.Dict):
            texts = [value.value for value in node.values if isinstance(value, ast.Constant)]
            found += [
                text for text in texts if isinstance(text, str) and text.startswith(("it ", "branches ", "reads "))
            ]
    return [reason for reason in found if len(reason.replace("x", "")) > 10]


def test_there_is_advice_for_every_reason_that_the_source_gives(repository: Path) -> None:
    files = [*(repository / "partitioner" / "recording").glob("*.py"), repository / "partitioner" / "ladder.py"]
    reasons = [reason for file in files for reason in reasons_in(ast.parse(file.read_text()))]
    assert len(reasons) > 25
    assert [reason for reason in reasons if not is_known(reason)] == []


# --- what the graph is for -------------------------------------------------------------------------------------------


def test_any_batch_size_and_fixed_sizes() -> None:
    lines = report_of(nn.Linear(4, 4))
    assert lines[1:4] == ["the graph is valid for:", "  any batch size", "  argument input: shape (rows, 4)"]


def test_sizes_that_are_free_are_said_to_be_any() -> None:
    ids = torch.zeros(4, 16, dtype=torch.long)
    lines = report_of(GPT(vocab=11, d_model=8, n_layers=1, n_heads=2, max_len=32), ids)
    assert any(line.endswith("shape (rows, any)") for line in lines)


def test_one_batch_size_only() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, 4) * 2 if len(x) == 4 else x.reshape(4, 4)

    lines = report_of(Fixed())
    assert "  batches of 4 rows only" in lines
    assert "  argument x: shape (4, 4)" in lines


def test_values_that_are_part_of_the_graph() -> None:
    def scaled(self: Body, x: torch.Tensor, mask: Any = None, *, scale: float = 1.0, word: str = "") -> torch.Tensor:
        return self.lin(x) * scale

    lines = report_of(Body(scaled), rows(), None, scale=2.0, word="w" * 99)
    (found,) = (line for line in lines if "part of the graph" in line)
    assert "=None" in found
    assert "scale=2.0" in found
    assert "wwww…" in found
    assert len(found) < 150


def test_many_values_are_cut_short() -> None:
    def summed(self: Body, x: torch.Tensor, numbers: list[int]) -> torch.Tensor:
        return self.lin(x) * sum(numbers)

    assert any(line.endswith(" and 14 more") for line in report_of(Body(summed), rows(), list(range(20))))


def test_modes_with_the_same_and_with_other_ops() -> None:
    def auxiliary(self: Body, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) if self.training else self.lin(x) * 2

    assert "training and evaluation run the same ops" in report_of(nn.Sequential(nn.Linear(4, 4), nn.Dropout()))
    assert "training and evaluation run the same ops" in report_of(
        between(lambda self, x: F.dropout(x, 0.5, self.training))
    )
    assert "training and evaluation run different ops" in report_of(between(auxiliary))


def test_checkpointed_groups_are_counted() -> None:
    def recomputed(self: Body, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.lin, checkpoint(self.lin, x, use_reentrant=False), use_reentrant=False)

    assert "2 checkpointed groups of ops, computed again in the backward" in report_of(between(recomputed))


def test_checks_of_sizes_are_told() -> None:
    class Big(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] < 1000 else x

    (found,) = (line for line in report_of(Big()) if "branches" in line)
    assert f"test_report.py:{line_of(Big.forward, '< 1000')}" in found


# --- shares ----------------------------------------------------------------------------------------------------------


def test_the_records_of_what_is_hidden() -> None:
    (found,) = capture(net(), (rows(),)).hidden()
    assert found == Hidden("1", "Gate", 2, 40 / 120, 32 / 160)
    assert capture(nn.Linear(4, 4), (rows(),)).hidden() == ()
    assert capture(Gate(), (rows(),)).hidden() == (Hidden("", "Gate", 2, 1.0, 1.0),)


def test_the_shares_do_not_depend_on_the_batch() -> None:
    assert capture(net(), (rows(64),)).hidden() == capture(net(), (rows(2),)).hidden()


def test_a_module_that_runs_twice_has_the_flops_of_both() -> None:
    gate = Gate()
    (found,) = capture(nn.Sequential(gate, gate, nn.Linear(4, 4)), (rows(),)).hidden()
    assert found.flop_share == pytest.approx(2 / 3)


def test_a_tied_parameter_counts_once() -> None:
    model = net()
    model[1].lin.weight = model[0].weight
    (found,) = capture(model, (rows(),)).hidden()
    assert found.parameter_share == 40 / 104


def test_attention_and_lstm_on_a_cpu_have_flops() -> None:
    model = nn.Sequential(
        nn.LSTM(4, 4, batch_first=True),
        Body(
            lambda self, x: F.scaled_dot_product_attention(*[x[0][:, None]] * 3, is_causal=bool(x[0].sum() < math.inf))
        ),
        nn.Linear(4, 4),
    )
    caught = capture(model, (torch.randn(4, 8, 4),))
    assert [call.path for call in caught.opaque] == ["1"]
    lstm, attention, linear = 2 * 8 * 4 * (4 * 4 + 4 * 4), 2 * 2 * 8 * 8 * 4, 2 * 8 * 4 * 4
    assert caught.hidden()[0].flop_share == pytest.approx(attention / (lstm + attention + linear))


def test_without_data_the_flops_are_counted_all_the_same() -> None:
    with torch.device("meta"):
        caught = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 12)), (torch.empty(4, 4),), opaque=["1"])
    assert caught.hidden()[0].flop_share == 0.75


def test_flops_that_are_not_known_are_not_made_up() -> None:
    caught = capture(net(), (rows(),))
    assert "33% of the parameters, FLOPs unknown (it does not run by itself)" in unknown(caught).report()
    assert unknown(caught).hidden()[0].flop_share is None
    without = capture(nn.Sequential(nn.ReLU(), nn.Tanh()), (rows(),), opaque=["1"])
    assert "0% of the parameters, FLOPs unknown (the model has no matrix products)" in without.report()


def unknown(caught: Capture) -> Capture:
    return dataclasses.replace(caught, flops={})


def test_counting_leaves_no_trace() -> None:
    def counts(self: Body, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        return self.norm(self.lin(x)) * torch.rand(1)

    model = between(counts, n=0, norm=nn.BatchNorm1d(4))
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    caught = capture(model, (rows(),))
    assert caught.flops[""] > caught.flops["1"] > 0
    assert model[1].n == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch_module._global_forward_pre_hooks
    assert not torch_module._global_forward_hooks


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"], ["blocks.{0..2}.mlp"]),
        (["blocks.0.mlp", "blocks.1.mlp"], ["blocks.{0,1}.mlp"]),
        (["b.0.m", "b.2.m", "b.4.m"], ["b.{0,2,4}.m"]),
        (["b.0.m", "b.0.n"], ["b.0.m", "b.0.n"]),
        ([f"b.{i}.e.{j}" for i in range(3) for j in range(4)], ["b.{0..2}.e.{0..3}"]),
        (["b.0.e.0", "b.0.e.1", "b.1.e.2"], ["b.0.e.{0,1}", "b.1.e.2"]),
        (["10.m", "9.m", "11.m"], ["{9..11}.m"]),
        ([""], [""]),
        (["head", "head2"], ["head", "head2"]),
    ],
)
def test_paths_are_folded(paths: list[str], names: list[str]) -> None:
    folded = fold(paths)
    assert [name for name, _ in folded] == names
    assert sorted(path for _, members in folded for path in members) == sorted(paths)
