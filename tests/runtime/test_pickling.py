"""Pickles between a parent and its workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stagecut.runtime.pickling import dumps, loads

property_test = settings(max_examples=80, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.complex64]


def named(model: nn.Module) -> tuple[dict[int, str], dict[str, torch.Tensor]]:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {id(tensor): name for name, tensor in state.items()}, state


def test_a_view_carries_only_its_own_bytes() -> None:
    batch = torch.randn(1000, 100)
    piece = batch[10:12]
    data = dumps(piece)
    assert len(data) < 2 * piece.numel() * piece.element_size() + 1000
    assert torch.equal(loads(data), piece)


def test_microbatches_together_are_about_as_large_as_the_batch() -> None:
    batch = torch.randn(64, 256)
    assert len(dumps(torch.split(batch, 8))) < 1.2 * batch.numel() * 4


@property_test
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(["plain", "turned", "expanded", "strided", "channels_last"]),
)
def test_tensors_come_back_with_values_dtype_shape_and_order(dtype: torch.dtype, shape: list[int], layout: str) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    if layout == "turned" and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    elif layout == "expanded":
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    elif layout == "strided" and tensor.dim():
        tensor = tensor[::2]
    elif layout == "channels_last" and tensor.dim() == 4:
        tensor = tensor.to(memory_format=torch.channels_last)
    back = loads(dumps({"x": [tensor]}))["x"][0]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)
    if layout != "expanded" and layout != "strided" and tensor.numel():
        assert back.stride() == tensor.stride()


def test_a_leaf_keeps_its_wish_for_a_gradient() -> None:
    wanted, plain = loads(dumps((torch.ones(2, requires_grad=True), torch.ones(2))))
    assert wanted.requires_grad
    assert wanted.is_leaf
    assert not plain.requires_grad


def test_what_comes_back_can_be_written_to() -> None:
    original = torch.zeros(3)
    back = loads(dumps(original))
    back.add_(1)
    assert (original.tolist(), back.tolist()) == ([0, 0, 0], [1, 1, 1])


def test_a_tensor_that_stands_twice_comes_back_once() -> None:
    x = torch.zeros(3)
    a, b = loads(dumps([x, x]))
    assert a is b


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(100, 100)
        self.second = nn.Linear(100, 100, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(100)


def test_named_tensors_travel_as_references() -> None:
    model = Tied()
    names, _ = named(model)
    assert len(dumps(model, names)) < model.first.weight.numel() * 4
    assert len(dumps(model)) > model.first.weight.numel() * 4


def test_references_become_the_receivers_own_tensors_and_ties_stay() -> None:
    model = Tied()
    names, state = named(model)
    theirs: dict[str, Any] = {
        name: nn.Parameter(torch.zeros_like(tensor)) if isinstance(tensor, nn.Parameter) else torch.zeros_like(tensor)
        for name, tensor in state.items()
    }
    back = loads(dumps(model, names), theirs)
    assert back.first.weight is theirs["first.weight"]
    assert back.second.weight is back.first.weight
    assert back.norm.running_mean is theirs["norm.running_mean"]
    assert {id(parameter) for parameter in back.parameters()} == {
        id(tensor) for tensor in theirs.values() if isinstance(tensor, nn.Parameter)
    }


def test_ties_stay_without_references_too() -> None:
    back = loads(dumps(Tied()))
    assert back.second.weight is back.first.weight
    assert isinstance(back.first.weight, nn.Parameter)


def test_a_reference_that_the_receiver_does_not_know_is_an_error() -> None:
    model = Tied()
    with pytest.raises(KeyError, match=r"first\.weight"):
        loads(dumps(model, named(model)[0]), {})


def test_functions_of_the_users_script_travel_by_value() -> None:
    scale = torch.tensor([2.0, 3.0])

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((output - target) * scale).sum()

    back = loads(dumps(loss))
    assert back is not loss
    assert back(torch.ones(2), torch.zeros(2)).item() == 5.0


def test_a_tensor_subclass_and_a_sparse_tensor_come_back_as_such() -> None:
    sparse = torch.eye(3).to_sparse()
    parameter, back = loads(dumps((nn.Parameter(torch.ones(2), requires_grad=False), sparse)))
    assert type(parameter) is nn.Parameter
    assert not parameter.requires_grad
    assert torch.equal(back.to_dense(), torch.eye(3))
