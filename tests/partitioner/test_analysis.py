"""Facts about ops against formulas and against what autograd does on the real model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stagecut.models.mlp import MLP
from stagecut.models.resnet import DigitsResNet
from stagecut.models.transformer import GPT
from stagecut.models.unet import UNet
from stagecut.partitioner.analysis import OpFacts, analyse
from stagecut.partitioner.capture import capture
from stagecut.partitioner.costs.analytic import analytic_costs
from stagecut.partitioner.devices import known_device
from stagecut.partitioner.meter import storage_of
from stagecut.structure import tensors_in

property_test = settings(max_examples=15, deadline=None, derandomize=True)


class Function(nn.Module):
    """A model whose forward is given as a function."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def facts_of(model: nn.Module, *args: torch.Tensor, rows: int | None = None) -> dict[str, OpFacts]:
    return analyse(capture(model, args), list(args), args[0].shape[0] if rows is None else rows)


def test_a_linear_layer_costs_two_flops_per_weight_and_row() -> None:
    facts = facts_of(nn.Sequential(nn.Linear(6, 10), nn.ReLU()), torch.randn(4, 6), rows=32)
    assert facts["_0"].flops == 2 * 32 * 6 * 10
    assert facts["_0"].output_bytes == 32 * 10 * 4
    assert facts["_1"].flops == 0
    assert facts["_1"].moved_bytes == 2 * 32 * 10 * 4
    assert [facts[name].n_kernels for name in ("_0", "_1")] == [1, 1]


def test_views_allocations_and_questions_about_tensors_are_no_work() -> None:
    model = Function(lambda self, x: x.t().reshape(-1).new_empty(7).zero_().to(x.device).view(7, 1))
    facts = facts_of(model, torch.randn(4, 3))
    assert {name: (own.n_kernels, own.moved_bytes) for name, own in facts.items() if own.n_kernels} == {
        "reshape": (1, 2 * 48),  # of a transposed tensor: a copy
        "zero_": (1, 2 * 28),
    }


@property_test
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 3]), st.sampled_from([1, 2]),
    st.integers(0, 1),
)  # fmt: skip
def test_a_convolution_costs_two_flops_per_weight_and_output_pixel(
    c_in: int, c_out: int, groups: int, kernel: int, stride: int, padding: int
) -> None:
    layer = nn.Conv2d(c_in * groups, c_out * groups, kernel, stride=stride, padding=padding, groups=groups, bias=False)
    rows, size = 5, 8
    facts = facts_of(nn.Sequential(layer), torch.randn(2, c_in * groups, size, size), rows=rows)
    out = (size + 2 * padding - kernel) // stride + 1
    assert facts["_0"].flops == 2 * rows * out * out * layer.weight.numel()
    assert tuple(facts["_0"].value.shape) == (rows, c_out * groups, out, out)


def test_facts_are_those_of_the_rows_asked_for() -> None:
    model = MLP(in_features=4, width=8, n_layers=2)
    small, large = (facts_of(model, torch.randn(6, 4), rows=rows) for rows in (3, 30))
    assert list(small) == list(large)
    for name, own in small.items():
        assert large[name].output_bytes == 10 * own.output_bytes
        assert large[name].flops == 10 * own.flops
        assert large[name].parameters == own.parameters


def counted_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What autograd keeps of a real run: each storage once; parameters, buffers and the input are there anyway."""
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[storage_of(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model.train()(x)
    known = {storage_of(tensor) for tensor in (*model.parameters(), *model.buffers(), x)}
    count = sum(tensor.untyped_storage().nbytes() for storage, tensor in held.items() if storage not in known)
    assert tensors_in(result)
    return count


INPLACE = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.Sigmoid()), torch.randn(4, 3)),
        (MLP(in_features=4, width=8, n_layers=3), torch.randn(6, 4)),
        (DigitsResNet(), torch.randn(3, 1, 8, 8)),
        (INPLACE, torch.randn(3, 1, 8, 8)),
        (UNet(1, 1, 4, 1), torch.randn(2, 1, 8, 8)),
        (GPT(vocab=11, d_model=8, n_layers=2, n_heads=2, max_len=5), torch.randint(0, 11, (2, 5))),
        (Function(lambda self, x: self.a(x).relu().view(-1, 2, 3).transpose(1, 2) * 2, a=nn.Linear(3, 6)),
         torch.randn(4, 3)),
        (Function(lambda self, x: self.a(x).detach() * x, a=nn.Linear(3, 3)), torch.randn(4, 3)),
    ],
    ids=["chain", "mlp", "resnet", "inplace", "unet", "gpt", "views", "no gradient"],
)  # fmt: skip
def test_saved_bytes_are_what_autograd_saves_of_the_real_model(model: nn.Module, x: torch.Tensor) -> None:
    facts = facts_of(model, x)
    assert sum(own.saved_bytes for own in facts.values()) == counted_bytes(model, x)


def test_saved_bytes_belong_to_the_first_op_that_keeps_them() -> None:
    model = Function(lambda self, x: self.a(x).sigmoid().exp(), a=nn.Linear(3, 3))
    facts = facts_of(model, torch.randn(4, 3))
    saved = {name: own.saved_bytes for name, own in facts.items() if own.op != "placeholder"}
    assert saved == {"a": 0, "sigmoid": 48, "exp": 48}


def test_frozen_layers_save_nothing_and_are_not_differentiable() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    model[0].requires_grad_(False)
    facts = facts_of(model, torch.randn(4, 3))
    assert [own.differentiable for own in facts.values()] == [False, False, False, True, True]
    assert [facts[name].saved_bytes for name in ("_0", "_1")] == [0, 0]
    assert facts["_2"].saved_bytes == 4 * 3 * 4  # its input, the result of the frozen part


def test_only_what_draws_random_numbers_in_training_is_random() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x) + F.dropout(x, 0.5, self.training) + torch.rand_like(x) + self.off(x).relu()

    model = Function(forward, drop=nn.Dropout(0.5), off=nn.Linear(3, 3)).eval()
    facts = facts_of(model, torch.randn(4, 3))
    assert {name for name, own in facts.items() if own.random} == {"drop", "dropout", "rand_like"}
    assert not model.training


def test_parameters_are_named_as_in_the_model_also_where_they_are_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("offset", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.b(self.a(x)) * self.scale + self.offset, self.a.weight)

    facts = facts_of(Tied(), torch.randn(4, 3))
    assert {name: own.parameters for name, own in facts.items() if own.parameters} == {
        "a": ("a.weight",),
        "b": ("a.weight", "b.bias"),
        "scale": ("scale",),
        "offset": ("offset",),
        "a_weight": ("a.weight",),
    }


def test_writes_in_place_are_noted_with_the_storage() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z = y.view(-1)
        y += 1
        return z.relu_().exp()

    facts = facts_of(Function(forward, a=nn.Linear(3, 3)), torch.randn(4, 3))
    storage = storage_of(facts["a"].value)
    assert {name for name, own in facts.items() if storage in own.written} == {"add_", "relu_"}
    assert {name for name, own in facts.items() if storage in own.touched} == {"a", "view", "add_", "relu_", "exp"}


def test_what_an_op_makes_and_drops_inside_is_no_write() -> None:
    class Inside(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                y = x * 2
                y.add_(1)
                return x + y.sum()
            return x

    model = nn.Sequential(nn.Linear(3, 3), *(Inside() for _ in range(6)), nn.Linear(3, 3))
    caught = capture(model, (torch.randn(4, 3),), opaque=[str(n) for n in range(1, 7)])
    facts = analyse(caught, [torch.randn(4, 3)], 4)
    assert not [name for name, own in facts.items() if own.written]


def test_a_batchnorm_writes_its_own_buffers_only() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    facts = facts_of(model, torch.randn(4, 3))
    assert not facts["_0"].written & facts["_1"].touched
    assert [len(facts[name].written) for name in ("_0", "_1", "_2")] == [3, 3, 0]
    assert model[0].num_batches_tracked.item() == 0
    assert model[0].running_mean.abs().sum() == 0


def test_running_statistics_of_a_functional_batchnorm_are_written() -> None:
    model = Function(lambda self, x: F.batch_norm(x, self.mean, self.var, training=True))
    model.register_buffer("mean", torch.zeros(3))
    model.register_buffer("var", torch.ones(3))
    facts = facts_of(model, torch.randn(4, 3))
    assert len(facts["batch_norm"].written) == 2


def test_a_model_that_looks_at_its_data_is_run_once_for_real_and_left_alone() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return self.lin(x) if x.sum() > 0 else -x

    model = nn.Sequential(Branch(), nn.Linear(3, 2))
    caught = capture(model, (torch.ones(4, 3),))
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="shapes cannot be known without running the model"):
        facts = analyse(caught, [torch.ones(4, 3)], 10)
    assert tuple(facts["_1"].value.shape) == (10, 2)
    assert facts["_1"].flops == 2 * 10 * 3 * 2
    assert model[0].seen.item() == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_analysis_allocates_nothing_of_the_size_of_the_batch() -> None:
    facts = facts_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4), rows=1 << 40)
    assert facts["_1"].output_bytes == (1 << 40) * 16


def test_channels_last_inputs_stay_so() -> None:
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = facts_of(nn.Sequential(nn.Conv2d(3, 4, 3)), x, rows=6)
    assert facts["input_1"].value.is_contiguous(memory_format=torch.channels_last)


def test_parameters_without_data_give_the_same_facts_and_prices() -> None:
    x = torch.zeros(4, 16, dtype=torch.long)
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = GPT(vocab=50, d_model=32, n_layers=1, n_heads=2, max_len=16)
        caught = capture(model, (x,))
        facts = analyse(caught, [x], 4)
        costs = analytic_costs(caught.graph_module, facts, known_device("A100").kind)
        works = {name: own for name, own in facts.items() if own.kernels}
        found.append([(own.kernels, own.saved_bytes, own.output_bytes, costs[name]) for name, own in works.items()])
    assert found[0] == found[1]
    # Attention keeps no scores: what it saves is linear in the tokens.
    attention = facts["scaled_dot_product_attention"]
    assert attention.saved_bytes < 5 * attention.output_bytes


def test_a_graph_that_makes_tensors_on_the_meta_device_is_analysed_there(warnings_are_errors: None) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + torch.arange(3, device=self.a.weight.device)

    with torch.device("meta"):
        model = Function(forward, a=nn.Linear(3, 3))
    facts = facts_of(model, torch.zeros(4, 3, device="meta"))
    assert facts["a"].flops == 2 * 4 * 3 * 3
    assert facts["add"].value.is_meta
