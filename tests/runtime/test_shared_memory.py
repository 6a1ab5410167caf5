"""Shared memory between workers: what was sent stays as it is for as long as anybody holds it, and no longer."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stagecut
from stagecut.errors import StallError
from stagecut.runtime.instructions import Layout
from stagecut.runtime.packets import decode, pack
from stagecut.runtime.shared_memory import ChannelFiles, Inbox, Outbox, PeerGone, channels_of

CPU = torch.device("cpu")


@dataclass
class Channel:
    """Both ends of a channel in one process."""

    outbox: Outbox
    inbox: Inbox
    files: ChannelFiles

    def send(self, step: int, microbatch: int, value: torch.Tensor) -> None:
        self.outbox.send(step, (False, 0, 1, microbatch), pack([value], [False]))

    def take(self, step: int, microbatch: int) -> torch.Tensor:
        (value,), _ = decode(self.inbox.take(step, (False, 0, 1, microbatch)), CPU)
        assert isinstance(value, torch.Tensor)
        return value

    def held_bytes(self) -> int:
        return os.fstat(self.files.memory).st_blocks * 512


@contextmanager
def channel(*, keeps_pages: bool = False) -> Iterator[Channel]:
    """A channel whose descriptors are closed at the end."""
    files = ChannelFiles.open(0, 1)
    outbox = Outbox(os.dup(files.memory), os.dup(files.sending), keeps_pages=keeps_pages)
    inbox = Inbox(os.dup(files.memory), os.dup(files.receiving))
    try:
        yield Channel(outbox, inbox, files)
    finally:
        outbox.close()
        inbox.close()
        files.close()


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_held_stays_and_what_is_dropped_makes_room(data: st.DataObject) -> None:
    """Random sends, takes in any order and drops: contents never change, rooms are as many as were alive at once."""
    with channel() as both:
        sent: dict[int, float] = {}
        held: dict[int, torch.Tensor] = {}
        count = most_alive = 0
        for what in data.draw(st.lists(st.sampled_from(["send", "take", "drop"]), max_size=40)):
            if what == "send":
                both.send(1, count, torch.full((300,), float(count)))
                sent[count] = float(count)
                count += 1
            elif what == "take" and sent:
                m = data.draw(st.sampled_from(sorted(sent)))
                del sent[m]
                # A view outlives the tensor that it was made from: a chunk, a slice, a saved activation.
                held[m] = both.take(1, m)[3:]
            elif what == "drop" and held:
                del held[data.draw(st.sampled_from(sorted(held)))]
            most_alive = max(most_alive, len(sent) + len(held))
            assert all(held[m].tolist() == [float(m)] * 297 for m in held)
        assert sum(map(len, both.outbox._rooms.values())) == most_alive


def test_a_receiver_computes_on_the_senders_memory() -> None:
    with channel() as both:
        both.send(1, 0, torch.zeros(4))
        first = both.take(1, 0)
        pointer = first.data_ptr()
        del first
        both.send(1, 1, torch.ones(4))
        second = both.take(1, 1)
        assert second.data_ptr() == pointer
        assert second.data_ptr() % 64 == 0
        assert second.tolist() == [1.0] * 4


def test_memory_that_is_not_used_any_more_goes_back_to_the_system() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux takes pages of shared memory back")
    with channel() as both:
        both.send(1, 0, torch.ones(1 << 20))
        del_me = both.take(1, 0)
        both.outbox.tidy(100)
        assert both.held_bytes() >= 4 << 20, "somebody still holds it"
        del del_me
        both.outbox.tidy(101)
        assert both.held_bytes() == 0
        both.send(102, 0, torch.ones(1 << 20))
        assert both.take(102, 0).sum() == 1 << 20


def test_memory_that_a_gpu_copies_from_keeps_its_pages() -> None:
    with channel(keeps_pages=True) as both:
        both.send(1, 0, torch.ones(1 << 20))
        del_me = both.take(1, 0)
        del del_me
        both.outbox.tidy(100)
        assert both.held_bytes() >= 4 << 20


def test_a_packet_of_another_step_is_refused() -> None:
    with channel() as both:
        both.send(1, 0, torch.ones(2))
        with pytest.raises(RuntimeError, match="a packet of step 1 came in step 2, from stage 0 to 1"):
            both.take(2, 0)


def test_an_end_whose_process_is_gone_is_noticed() -> None:
    files = ChannelFiles.open(0, 1)
    outbox, inbox = Outbox(os.dup(files.memory), files.sending), Inbox(files.memory, files.receiving)
    outbox.close()
    with pytest.raises(PeerGone, match="stage 0"):
        inbox.take(1, (False, 0, 1, 0))
    inbox.close()
    files = ChannelFiles.open(0, 1)
    outbox, inbox = Outbox(os.dup(files.memory), files.sending), Inbox(files.memory, files.receiving)
    inbox.close()
    with pytest.raises(PeerGone, match="stage 1"):
        outbox.send(1, (False, 0, 1, 0), pack([torch.ones(2)], [False]))
    outbox.close()


def test_channels_are_those_that_packets_travel_on() -> None:
    skip = Layout(((0, 1), (2,), (0, 1)), ((0, 1), (1, 2), (0, 2)), ((0, 1), (1, 2)))
    assert channels_of(skip) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert channels_of(Layout(((0,), (1,)), ((0, 1),), ())) == [(0, 1)]
    assert channels_of(Layout(((0,),), (), ())) == []


class Keeping(nn.Module):
    """Keeps what it was given, for as long as it lives, and adds up what it kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(x.detach())
        return x + torch.stack([old.sum() for old in self.kept]).sum()


def test_a_module_that_keeps_its_inputs_finds_them_unchanged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Keeping())
    nn.init.eye_(model[0].weight)  # type: ignore[arg-type]
    nn.init.zeros_(model[0].bias)  # type: ignore[arg-type]
    rows = torch.arange(1.0, 9.0)[:, None].expand(8, 4).contiguous()
    options = {"opaque": ["2"], "microbatches": 8, "costs": "analytic", "threads_per_worker": 1}
    with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=lambda out, y: (out - y).mean(), **options) as pm:
        first = pm.evaluate(rows, target=rows).output[:, 0]
        second = pm.evaluate(rows, target=rows).output[:, 0]
    # Row r is r + 4 * (1 + ... + r) at first; the second time all 4 * 36 of the first pass are added.
    expected = torch.arange(1.0, 9.0) + 4 * torch.arange(1.0, 9.0).cumsum(0)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected + 4 * 36)


def test_a_closed_pipeline_leaves_neither_descriptors_nor_its_model() -> None:
    def step() -> weakref.ref[nn.Module]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        options = {"costs": "analytic", "threads_per_worker": 1}
        with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=nn.functional.mse_loss, **options) as pm:
            pm.step(torch.ones(4, 4), target=torch.ones(4, 2))
        return weakref.ref(model)

    step()
    gc.collect()
    before = psutil.Process().num_fds()
    model = step()
    gc.collect()
    assert model() is None
    assert psutil.Process().num_fds() == before


def test_a_receiver_with_a_deadline_says_what_did_not_come() -> None:
    files = ChannelFiles.open(0, 1)
    high = fcntl.fcntl(files.receiving, fcntl.F_DUPFD, 1100)  # as in a process with many open files
    os.close(files.receiving)
    outbox, inbox = Outbox(os.dup(files.memory), files.sending), Inbox(files.memory, high, timeout_s=0.05)
    try:
        outbox.send(1, (True, 2, 1, 2), pack([torch.ones(2)], [False]))
        assert inbox.take(1, (True, 2, 1, 2)) is not None
        with pytest.raises(StallError, match="the gradient of microbatch 3 from stage 2 to stage 1 did not"):
            inbox.take(1, (True, 2, 1, 3))
    finally:
        outbox.close()
        inbox.close()
