"""Packets: what goes in comes out, by bytes alone."""

from __future__ import annotations

import json
import math
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.runtime.packets import decode, encode, total_bytes
from stagecut.structure import is_encodable

property_test = settings(max_examples=150, deadline=None, derandomize=True)
CPU = torch.device("cpu")
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in the order of its elements, so that NaN and -0 compare."""
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def round_trip(value: Any, *, wants_gradient: bool = False) -> Any:
    (back,), _ = decode(encode([value], [wants_gradient]), CPU)
    return back


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype and layout: 0-dim, empty, transposed, expanded, sliced, channels_last."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    n_bytes = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=n_bytes, max_size=n_bytes))
    if dtype is torch.bool:
        raw = bytes(byte % 2 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype) if raw else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    layout = draw(st.sampled_from(["plain", "transposed", "expanded", "strided", "channels_last", "conjugate", "grad"]))
    if layout == "transposed" and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    elif layout == "expanded":
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    elif layout == "strided" and tensor.dim():
        tensor = tensor[::2]
    elif layout == "channels_last" and tensor.dim() == 4:
        tensor = tensor.to(memory_format=torch.channels_last)
    elif layout == "conjugate" and dtype.is_complex:
        tensor = tensor.conj()
    elif layout == "grad" and (dtype.is_floating_point or dtype.is_complex):
        tensor = tensor.clone().requires_grad_() * 1 if dtype.itemsize > 1 else tensor.requires_grad_()
    return tensor


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.lists(st.integers(0, 9), max_size=4).map(torch.Size),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 3), torch.device("meta")]),
)
values = st.recursive(
    tensors() | plain,
    lambda inside: st.one_of(
        st.lists(inside, max_size=3),
        st.lists(inside, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inside, max_size=3),
    ),
    max_leaves=6,
)


@property_test
@given(st.lists(values, max_size=4))
def test_values_come_out_as_they_went_in(items: list[Any]) -> None:
    assert all(is_encodable(item) for item in items)
    back, flags = decode(encode(items, [False] * len(items)), CPU)
    assert same(back, items)
    assert flags == [False] * len(items)


@property_test
@given(st.lists(tensors(), min_size=1, max_size=3))
def test_the_length_stands_in_front_and_tensors_lie_aligned_in_the_packet(items: list[torch.Tensor]) -> None:
    packet = encode(items, [False] * len(items))
    assert packet.dtype is torch.uint8
    assert packet.device == CPU
    assert total_bytes(packet[:8]) == total_bytes(packet) == packet.numel()
    start, end = packet.data_ptr(), packet.data_ptr() + packet.numel()
    for tensor in decode(packet, CPU)[0]:
        if tensor.numel():
            assert (tensor.data_ptr() - start) % 64 == 0
            assert start <= tensor.data_ptr() <= end - tensor.numel() * tensor.element_size()
            assert not tensor.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_every_dtype_travels_in_every_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    assert same(round_trip(tensor), tensor)


def test_the_wish_for_a_gradient_travels_with_each_value() -> None:
    items = [torch.zeros(2), 3, torch.ones(1), None, torch.zeros(())]
    wanted = [True, False, False, False, True]
    assert decode(encode(items, wanted), CPU)[1] == wanted


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
        torch.randn(3, 4).t(),
        torch.randn(2, 3, 4).permute(1, 2, 0),
    ],
)
def test_the_order_of_dimensions_in_memory_is_kept(tensor: torch.Tensor) -> None:
    back = round_trip(tensor)
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


def test_gaps_and_overlaps_do_not_travel() -> None:
    expanded = torch.arange(4.0).expand(1000, 4)
    sliced = torch.zeros(100, 100)[:2, :3]
    assert round_trip(expanded).is_contiguous()
    assert encode([sliced], [False]).numel() < 1000
    assert torch.equal(round_trip(expanded), expanded)


def test_a_packet_holds_copies() -> None:
    tensor = torch.zeros(3)
    packet = encode([tensor], [False])
    tensor.fill_(1)
    assert decode(packet, CPU)[0][0].tolist() == [0, 0, 0]


def test_decoded_tensors_share_the_packet() -> None:
    packet = encode([torch.zeros(3)], [False])
    (first,), _ = decode(packet, CPU)
    first.fill_(7)
    assert decode(packet, CPU)[0][0].tolist() == [7, 7, 7]


def test_equal_headers_do_not_share_mutable_values() -> None:
    packet = encode([{"k": [1, 2]}], [False])
    decode(packet, CPU)[0][0]["k"].append(3)
    assert decode(packet, CPU)[0] == [{"k": [1, 2]}]


def test_a_packet_is_read_without_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    value = (torch.ones(2), {"a": [None, torch.Size([1]), torch.bfloat16]})
    packet = encode([value], [True])
    header = packet[16 : 16 + int(packet[8:16].view(torch.int64))].numpy().tobytes()
    json.loads(header)
    assert same(decode(packet, CPU)[0], [value])


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, slice(0, 1), torch.zeros(2).to_sparse(), [torch.zeros(2).to_sparse()], OrderedDict(a=1)]
)
def test_what_cannot_travel_is_refused(value: Any) -> None:
    assert not is_encodable(value)
    with pytest.raises(TypeError, match="cannot cross a stage boundary"):
        encode([value], [False])
