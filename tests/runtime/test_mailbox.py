"""Mailboxes: tensors of messages in memory that two processes map."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.runtime.mailbox import LARGE_BYTES, Mailbox
from stagecut.runtime.pickling import dumps, loads

property_test = settings(max_examples=80, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64]
LAYOUTS = ["plain", "turned", "expanded", "strided", "channels_last", "conjugate"]


@pytest.fixture
def ends() -> Iterator[tuple[Mailbox, Mailbox]]:
    """Two ends of one mailbox, as two processes have them."""
    one = Mailbox()
    other = Mailbox(os.dup(one.fd))
    yield one, other
    one.close()
    other.close()


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "turned" and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    if layout == "expanded":
        return tensor.unsqueeze(0).expand(3, *tensor.shape)
    if layout == "strided" and tensor.dim():
        return tensor[::2]
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.to(memory_format=torch.channels_last)
    return tensor.conj() if layout == "conjugate" else tensor


@property_test
@given(st.sampled_from(DTYPES), st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=4), st.sampled_from(LAYOUTS))
def test_the_other_end_reads_what_was_put(dtype: torch.dtype, shapes: list[list[int]], layout: str) -> None:
    one = Mailbox()
    other = Mailbox(os.dup(one.fd))
    sent = [laid_out(torch.randint(0, 2, shape).to(dtype), layout) for shape in shapes]
    one.start()
    got = [other.get(letter) for letter in [one.put(tensor) for tensor in sent]]
    one.close()
    other.close()
    for tensor, back in zip(sent, got):
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)
        if layout in ("plain", "turned", "channels_last") and tensor.numel():
            assert back.stride() == tensor.stride()


def test_what_was_received_outlives_the_next_message(ends: tuple[Mailbox, Mailbox]) -> None:
    one, other = ends
    first = loads(dumps(torch.ones(LARGE_BYTES), mailbox=one), mailbox=other)
    second = loads(dumps(torch.zeros(4 * LARGE_BYTES), mailbox=one), mailbox=other)
    assert first.eq(1).all()
    assert second.eq(0).all()
    answer = loads(dumps(torch.full((LARGE_BYTES,), 2.0), mailbox=other), mailbox=one)
    assert answer.eq(2).all(), "the same memory serves both ways, in turn"


def test_large_tensors_leave_the_message_and_small_ones_stay(ends: tuple[Mailbox, Mailbox]) -> None:
    one, other = ends
    message = {"batch": torch.randn(LARGE_BYTES // 4), "rows": torch.arange(LARGE_BYTES // 8 - 1)}
    data = dumps(message, mailbox=one)
    assert LARGE_BYTES - 8 < len(data) < LARGE_BYTES + 2000
    back = loads(data, mailbox=other)
    assert all(torch.equal(back[name], message[name]) for name in message)


def test_one_tensor_in_two_places_travels_once_and_stays_one(ends: tuple[Mailbox, Mailbox]) -> None:
    one, other = ends
    mask = torch.randn(LARGE_BYTES, requires_grad=True)
    data = dumps([mask, {"again": mask}], mailbox=one)
    back = loads(data, mailbox=other)
    assert back[0] is back[1]["again"]
    assert back[0].requires_grad
    assert os.fstat(one.fd).st_size < 2 * mask.numel() * 4


def test_state_goes_by_name_even_if_it_is_large(ends: tuple[Mailbox, Mailbox]) -> None:
    one, other = ends
    weight = torch.nn.Parameter(torch.randn(LARGE_BYTES))
    data = dumps([weight], {id(weight): "weight"}, one)
    assert loads(data, {"weight": weight}, other)[0] is weight
    assert os.fstat(one.fd).st_size == 0
