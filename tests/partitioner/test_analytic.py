"""Roofline prices: by dtype, backwards in two parts, memory at the worst moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stagecut.models.transformer import GPT
from stagecut.partitioner.analysis import analyse
from stagecut.partitioner.capture import capture
from stagecut.partitioner.cluster import DeviceKind
from stagecut.partitioner.costs.analytic import analytic_costs, roofline_s
from stagecut.partitioner.costs.op_cost import OpCost
from stagecut.partitioner.meter import Kernel, MemoryMeter

# Only arithmetic costs anything, so that seconds are operations.
ARITHMETIC = DeviceKind("arithmetic", {"float32": 1.0, "bfloat16": 10.0, "float64": 0.5}, float("inf"), 0.0, 1e9, "")
PLAIN = DeviceKind("plain", {"float32": 1e9}, 1e9, 1e-6, 1e9, "")
B, D, K = 32, 6, 10


def costs_of(model: nn.Module, *args: torch.Tensor, kind: DeviceKind = ARITHMETIC) -> dict[str, OpCost]:
    caught = capture(model, args)
    return analytic_costs(caught.graph_module, analyse(caught, list(args), args[0].shape[0]), kind)


class Function(nn.Module):
    """A model whose forward is given as a function."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.function(self, x)
        return result


def test_the_roofline_bounds_every_kernel_by_itself() -> None:
    kind = DeviceKind("k", {"float32": 100.0, "bfloat16": 400.0}, 10.0, 0.5, 1e9, "")
    computes, moves = Kernel(1000, torch.float32, 10), Kernel(0, torch.float32, 100)
    assert roofline_s(kind, [computes]) == 10.5
    assert roofline_s(kind, [moves]) == 10.5
    assert roofline_s(kind, [computes, moves]) == 21.0
    assert roofline_s(kind, [Kernel(1000, torch.bfloat16, 10)]) == 3.0


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 1.0), (torch.bfloat16, 10.0), (torch.float64, 0.5)])
def test_arithmetic_is_priced_at_the_rate_of_its_dtype(dtype: torch.dtype, rate: float) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(D, K)).to(dtype)
    costs = costs_of(model, torch.randn(B, D, dtype=dtype))
    assert costs["_1"].forward_s == 2 * B * D * K / rate


def test_under_autocast_arithmetic_is_priced_in_the_dtype_that_it_runs_in() -> None:
    def forward(self: Function, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.a(x)

    layer = nn.Linear(D, K)
    costs = costs_of(Function(forward, a=layer), torch.randn(B, D))
    assert costs["autocast_bfloat16_call"].forward_s == 2 * B * D * K / 10.0
    with torch.autocast("cpu", torch.bfloat16):
        outer = costs_of(nn.Sequential(nn.Linear(D, D), layer), torch.randn(B, D))
    assert outer["_1"].forward_s == 2 * B * D * K / 10.0
    assert outer["_1"].backward_s == pytest.approx(2 * outer["_1"].forward_s)


def test_a_linear_backward_is_one_half_for_its_weight() -> None:
    costs = costs_of(nn.Sequential(nn.Linear(D, D), nn.Linear(D, K)), torch.randn(B, D))
    product = 2 * B * D * K
    assert costs["_1"].backward_s == 2 * product
    assert costs["_1"].backward_weight_s == product
    # The first layer's input wants no gradient.
    assert costs["_0"].backward_s == costs["_0"].backward_weight_s == 2 * B * D * D


def test_a_backward_counts_its_own_kernels_and_no_others() -> None:
    counting = DeviceKind("counting", {"float32": float("inf")}, float("inf"), 1.0, 1e9, "")
    costs = costs_of(nn.Sequential(nn.Linear(D, D), nn.Linear(D, K, bias=False)), torch.randn(B, D), kind=counting)
    assert (costs["_1"].forward_s, costs["_1"].backward_s, costs["_1"].backward_weight_s) == (1, 2, 1)


def test_frozen_weights_and_ops_without_any_have_no_weight_part() -> None:
    frozen = nn.Linear(D, K).requires_grad_(False)
    costs = costs_of(nn.Sequential(nn.Linear(D, D), nn.GELU(), frozen), torch.randn(B, D), kind=PLAIN)
    assert costs["_1"].backward_weight_s == costs["_2"].backward_weight_s == 0.0
    assert costs["_2"].backward_s > 0
    assert costs["_1"].backward_s > 0


def test_a_weight_that_is_used_as_a_tensor_counts_as_a_parameter() -> None:
    def forward(self: Function, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) @ self.b.weight.t()

    costs = costs_of(Function(forward, a=nn.Linear(D, D), b=nn.Linear(D, K)), torch.randn(B, D))
    assert costs["matmul"].backward_s == 2 * 2 * B * D * K
    assert costs["matmul"].backward_weight_s == 2 * B * D * K


def test_the_same_op_on_a_weight_and_on_a_value_is_priced_apart() -> None:
    def forward(self: Function, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return (y @ self.b.weight) + (y @ self.c(self.a(x)))

    caught = costs_of(
        Function(forward, a=nn.Linear(D, D), b=nn.Linear(D, D, bias=False), c=nn.Linear(D, D)), torch.randn(D, D)
    )
    assert caught["matmul"].backward_s == caught["matmul_1"].backward_s == 2 * 2 * D**3
    assert (caught["matmul"].backward_weight_s, caught["matmul_1"].backward_weight_s) == (2 * D**3, 0.0)


def test_an_opaque_module_has_both_parts() -> None:
    x = torch.randn(B, D)
    inner = nn.Sequential(nn.Linear(D, K), nn.Tanh(), nn.Linear(K, D))
    caught = capture(nn.Sequential(nn.Linear(D, D), inner), (x,), opaque=["1"])
    cost = analytic_costs(caught.graph_module, analyse(caught, [x], B), ARITHMETIC)["_1"]
    product = 2 * B * D * K
    assert (cost.forward_s, cost.backward_s, cost.backward_weight_s) == (2 * product, 4 * product, 2 * product)


def test_a_kernel_that_makes_both_gradients_at_once_has_no_weight_part() -> None:
    x = torch.randn(4, 3, D)
    caught = capture(nn.Sequential(nn.Linear(D, D), nn.LSTM(D, K, batch_first=True)), (x,))
    cost = analytic_costs(caught.graph_module, analyse(caught, [x], 4), ARITHMETIC)["_1"]
    assert cost.forward_s == 2 * 4 * 3 * (4 * K * D + 4 * K * K)
    assert (cost.backward_s, cost.backward_weight_s) == (2 * cost.forward_s, 0.0)


def test_workspace_is_what_lives_besides_inputs_outputs_and_what_is_saved() -> None:
    n_bytes = 4
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, K), nn.LogSoftmax(1))
    costs = costs_of(model, torch.randn(B, D))
    assert costs["_1"].workspace_bytes == costs["_3"].workspace_bytes == 0
    assert costs["_2"].workspace_bytes == n_bytes * (D * K + K)  # new gradients of weight and bias


def test_intermediates_that_are_dropped_inside_an_op_are_workspace() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat(1, 8).sum(1)

    x = torch.randn(B, D)
    caught = capture(nn.Sequential(nn.Linear(D, D), Wide()), (x,), opaque=["1"])
    costs = analytic_costs(caught.graph_module, analyse(caught, [x], B), PLAIN)
    # The gradient of the wide tensor is an expanded view, so the forward is the worst moment.
    assert costs["_1"].workspace_bytes == 4 * B * D * 8


def test_a_memory_meter_follows_what_lives_and_forgets_what_was_there() -> None:
    x = torch.zeros(100)
    with MemoryMeter() as meter:
        y = x + 1
        z = (y.view(10, 10) * 2).t()
        assert (meter.live_bytes, meter.peak_bytes) == (800, 800)
        del y
        assert (meter.live_bytes, meter.peak_bytes) == (400, 800)
        x.add_(1)
        assert meter.live_bytes == 400
        meter.reset()
        del z
        assert (meter.live_bytes, meter.peak_bytes) == (0, 0)
        x + 1
        assert (meter.live_bytes, meter.peak_bytes) == (0, 400)


def test_an_op_that_does_not_run_without_data_is_guessed_from_its_forward() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) if float(x.detach().sum()) < 1e9 else x

    x = torch.randn(B, D)
    with pytest.warns(UserWarning, match="shapes cannot be known without running the model"):
        costs = costs_of(nn.Sequential(nn.Linear(D, D), Reads()), x)
    (cost,) = [cost for cost in costs.values() if cost.backward_s and cost.workspace_bytes > 4 * (D * D + D)]
    assert cost.backward_s == 2 * cost.forward_s
    assert cost.backward_weight_s == cost.forward_s


def test_the_backward_of_attention_is_two_and_a_half_forwards() -> None:
    def forward(self: Function, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.a(x).view(B, 2, 4, 3 * D).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)

    cost = costs_of(Function(forward, a=nn.Linear(D, 24 * D)), torch.randn(B, D))["scaled_dot_product_attention"]
    assert cost.forward_s == 2 * 2 * (B * 2) * 4 * 4 * D
    assert cost.backward_s == 2.5 * cost.forward_s


def test_a_transformer_spends_half_of_its_backward_products_on_weights() -> None:
    model = GPT(vocab=50, d_model=32, n_layers=2, n_heads=2, max_len=8)
    costs = costs_of(model, torch.zeros(4, 8, dtype=torch.long))
    forward_s = sum(cost.forward_s for cost in costs.values())
    backward_s = sum(cost.backward_s for cost in costs.values())
    weight_s = sum(cost.backward_weight_s for cost in costs.values())
    assert 1.9 * forward_s < backward_s < 2.5 * forward_s
    assert 0.3 * backward_s < weight_s < 0.5 * backward_s
