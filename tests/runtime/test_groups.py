"""Ranks wait for each other's work as long as it takes, and for a rank that is silent or gone as long as was said."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stagecut.errors import DeviceError, StallError
from stagecut.runtime.joining import fresh_part
from stagecut.runtime.rank_devices import _own_device


def test_work_is_waited_for_and_silence_is_not(repository: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(repository / "tests" / "support" / "two_ranks.py")
    world = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    silent, waiting = (
        subprocess.Popen(
            [sys.executable, script, str(rank)], env={**world, "RANK": str(rank)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    )  # fmt: skip
    try:
        assert waiting.stdout is not None
        assert waiting.stdin is not None
        told = [waiting.stdout.readline(), waiting.stdout.readline()]
        assert told[0] == "rank 1 saw the work done\n", silent.communicate(timeout=60)[1]
        stalled = re.match(r"stalled after (\d+\.\d) s: rank 1 heard nothing of another rank for too long", told[1])
        assert stalled is not None, told
        assert 1.5 < float(stalled[1]) < 20
        said, errors = silent.communicate(timeout=60)
        assert (silent.returncode, said) == (0, "rank 0 saw the work done\n"), errors
        lost, errors = waiting.communicate(timeout=60)
        assert re.match(r"lost: rank 1 lost another rank, in the test: .*\nleft alone: a model's own error\n", lost), (
            lost + errors
        )
    finally:
        for process in (silent, waiting):
            process.kill()
            process.wait()


class Stores:
    """A server, and a connection to it for each rank, as torchrun's agents and ranks have them."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=self._timeout)

    def connection(self) -> Any:
        return dist.TCPStore("127.0.0.1", self.server.port, is_master=False, timeout=self._timeout)

    def join(self, n_ranks: int) -> list[str]:
        """Let ranks find each other; return what each finds in its part after rank 0 has written there."""
        connections = [self.connection() for _ in range(n_ranks)]

        def rank(r: int) -> str:
            part = fresh_part(connections[r], r, n_ranks)
            assert not part.check(["address"]) or r > 0
            if r == 0:
                part.set("address", str(time.monotonic_ns()))
            found: bytes = part.get("address")
            return found.decode()

        with ThreadPoolExecutor(n_ranks) as pool:
            return list(pool.map(rank, range(n_ranks)))


def test_ranks_that_are_started_again_find_each_other_and_nothing_of_before() -> None:
    stores = Stores(30)
    seen = []
    for n_ranks in (3, 3, 2, 4, 1):
        found = stores.join(n_ranks)
        assert len(set(found)) == 1
        seen.append(found[0])
        room = dist.PrefixStore("stagecut", stores.connection())
        room.queue_push("arrivals", "hello 1 of-a-rank-that-was-killed")
        room.queue_push("arrivals", "here 1 of-a-rank-that-was-killed")
    assert len(set(seen)) == 5


def test_a_rank_that_does_not_start_is_waited_for_so_long() -> None:
    stores = Stores(0.5)
    for rank in (0, 1):
        with pytest.raises(StallError, match=f"rank {rank} of 2 waited 0 s for the other ranks to start"):
            fresh_part(stores.connection(), rank, 2)


def test_a_rank_has_the_accelerator_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _own_device() == "cpu" or torch.accelerator.is_available()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _own_device() == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DeviceError, match=r"rank 2 of this machine .* there are 2\n.*--nproc-per-node 2"):
        _own_device()
