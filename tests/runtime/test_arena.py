"""Arenas: tensors at known places in memory that several processes map."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stagecut
from stagecut.runtime.arena import Arena, parameter_over

property_test = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64]


def again(arena: Arena) -> Arena:
    """The same memory mapped a second time, as another process does."""
    return Arena(os.dup(arena.fd), arena.n_bytes, arena.slots)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "count": torch.tensor(3),
        "none": torch.empty(0, 4),
        "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "turned": torch.randn(4, 6).t(),
        "mask": torch.tensor([True, False]),
    }


def test_what_one_mapping_writes_the_other_reads() -> None:
    given_in = tensors()
    arena = Arena.create(given_in.items())
    other = again(arena)
    for name, tensor in given_in.items():
        arena.view(name).copy_(tensor)
    for name, tensor in given_in.items():
        assert torch.equal(other.view(name), tensor)
    other.view("weight").zero_()
    assert arena.view("weight").abs().sum() == 0
    assert torch.equal(arena.view("image"), given_in["image"])


def test_what_another_process_writes_is_there() -> None:
    arena = Arena.create([("weight", torch.zeros(4))])
    code = "import mmap, sys, struct; m = mmap.mmap(int(sys.argv[1]), 0); m[:16] = struct.pack('4f', 1, 2, 3, 4)"
    subprocess.run([sys.executable, "-c", code, str(arena.fd)], check=True, pass_fds=[arena.fd])
    assert arena.view("weight").tolist() == [1, 2, 3, 4]


def test_layouts_and_dtypes_are_those_of_the_tensors() -> None:
    given_in = tensors()
    arena = Arena.create(given_in.items())
    for name, tensor in given_in.items():
        view = arena.view(name)
        assert (view.dtype, view.shape) == (tensor.dtype, tensor.shape)
        assert view.stride() == tensor.stride()


def test_a_change_of_one_view_is_no_change_of_another_for_autograd() -> None:
    arena = Arena.create([("weight", torch.zeros(3)), ("running_mean", torch.zeros(3))])
    weight, buffer = parameter_over(arena.view("weight")), arena.view("running_mean")
    with torch.no_grad():
        weight.fill_(2.0)
    before = weight._version
    loss = (weight * weight).sum()
    buffer.add_(1.0)
    again(arena).view("weight")
    assert weight._version == before
    loss.backward()
    assert weight.grad.tolist() == [4.0, 4.0, 4.0]


def test_a_change_of_a_saved_view_is_still_noticed() -> None:
    arena = Arena.create([("weight", torch.zeros(3))])
    weight = parameter_over(arena.view("weight"))
    loss = (weight * weight).sum()
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@property_test
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_tensors_do_not_overlap(described: list[tuple[torch.dtype, list[int]]]) -> None:
    given_in = {str(k): torch.ones(shape).to(dtype) * (k + 1) for k, (dtype, shape) in enumerate(described)}
    arena = Arena.create(given_in.items())
    for name, tensor in given_in.items():
        assert arena.view(name).data_ptr() % 64 == 0 or not tensor.numel()
        arena.view(name).copy_(tensor)
    for name, tensor in given_in.items():
        assert torch.equal(arena.view(name), tensor)
    arena.close()


def test_fresh_memory_is_zero() -> None:
    assert Arena.create([("gradient", torch.ones(1000))]).view("gradient").abs().sum() == 0


def test_views_outlive_the_file() -> None:
    arena = Arena.create([("weight", torch.zeros(3))])
    view, fd = arena.view("weight"), arena.fd
    arena.close()
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    del arena
    view.fill_(1.0)
    assert view.tolist() == [1, 1, 1]


def test_the_file_has_no_name_in_the_file_system() -> None:
    arena = Arena.create([("weight", torch.zeros(3))])
    assert os.fstat(arena.fd).st_nlink == 0


def test_only_floating_and_complex_parameters_want_gradients() -> None:
    kinds = {"w": torch.float32, "c": torch.complex64, "n": torch.int64}
    arena = Arena.create([(name, torch.zeros(2, dtype=dtype)) for name, dtype in kinds.items()])
    assert [parameter_over(arena.view(name)).requires_grad for name in ("w", "c", "n")] == [True, True, False]
    parameter = parameter_over(arena.view("w"))
    assert type(parameter) is nn.Parameter
    assert parameter.data_ptr() == arena.view("w").data_ptr()


def test_a_saved_tensor_takes_its_own_bytes_along_and_not_the_arenas(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.ones(4, 64)
    with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=nn.functional.mse_loss, costs="analytic") as pm:
        pm.step(x, target=x)
        torch.save(pm.state_dict(), tmp_path / "state.pt")
        torch.save(model[0].bias, tmp_path / "bias.pt")
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert n_bytes < (tmp_path / "state.pt").stat().st_size < 1.2 * n_bytes
    assert (tmp_path / "bias.pt").stat().st_size < 4096
