"""Channels between ranks of one machine: who hands them over, and who does not."""

from __future__ import annotations

import os
import socket
import threading

import pytest
import torch

from stagecut.errors import StageError
from stagecut.runtime.neighbours import _connected, _Listener, _machine
from stagecut.runtime.packets import decode, pack
from stagecut.runtime.shared_memory import Outbox

pytestmark = pytest.mark.skipif(not _machine(), reason="no memory is shared this way here")


def test_a_channel_is_handed_over_and_carries_packets() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with _Listener() as listener:
        outboxes: list[Outbox] = []
        sender = threading.Thread(target=lambda: outboxes.append(_connected(3, 1, listener.address["name"])))
        sender.start()
        (inbox,) = listener.accepted({3}, timeout_s=30).values()
        sender.join()
    outbox = outboxes.pop()
    value = torch.arange(5.0)
    outbox.send(1, (False, 0, 1, 0), pack([value], [True]))
    (found,), wanted = decode(inbox.take(1, (False, 0, 1, 0)), torch.device("cpu"))
    assert torch.equal(found, value)
    assert wanted == [True]
    outbox.close()
    inbox.close()
    del inbox, outbox, found
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_rank_that_does_not_come_is_named() -> None:
    with _Listener() as listener, pytest.raises(StageError, match=r"ranks \[2, 5\] of this machine did not open"):
        listener.accepted({2, 5}, timeout_s=0.05)


def test_a_connection_without_a_channel_is_refused() -> None:
    with _Listener() as listener, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{listener.address['name']}")
        connection.send(b"hello")
        with pytest.raises(StageError, match="handed over no channel"):
            listener.accepted({0}, timeout_s=5)
