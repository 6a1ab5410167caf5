"""The processes that write one checkpoint together: what one of them fails at, all of them hear of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ...errors import CheckpointError
from ..groups import at_work, make_group, peers_told


class Peers(Protocol):
    """Who writes: one process, or the ranks of torchrun."""

    rank: int

    def at_work(self) -> AbstractContextManager[None]:
        """Wait until every process has done what it does inside, however long that takes; all of them call it."""

    def gather(self, mine: bytes) -> list[bytes]:
        """Return what every process gave, by rank; all of them call it."""


class Alone:
    """One process."""

    rank = 0

    def at_work(self) -> AbstractContextManager[None]:
        """Wait for nobody."""
        return nullcontext()

    def gather(self, mine: bytes) -> list[bytes]:
        """Return what this process gave."""
        return [mine]


class Ranks:
    """The ranks of torchrun, over a group of their own, so that a thread can use it beside training.

    A rank that is gone or stopped is waited for ``timeout_s``; one that reads or writes, as long as it takes.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank = dist.get_rank()
        self._timeout_s = timeout_s
        self._group: Any = make_group(None, "gloo", timeout_s)

    def at_work(self) -> AbstractContextManager[None]:
        """Wait for the ranks that are at work."""
        return at_work(self._group, self._timeout_s)

    def gather(self, mine: bytes) -> list[bytes]:
        """Return what every rank gave."""
        with peers_told("while ranks spoke of a checkpoint"):
            return self._gather(mine)

    def _gather(self, mine: bytes) -> list[bytes]:
        length = torch.tensor([len(mine)])
        lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, length, group=self._group)
        longest = max(int(each.item()) for each in lengths)
        padded = torch.zeros(max(longest, 1), dtype=torch.uint8)
        padded[: len(mine)] = torch.frombuffer(bytearray(mine or b"\0"), dtype=torch.uint8)[: len(mine)]
        everyone = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(everyone, padded, group=self._group)
        return [bytes(each[: int(n.item())].tolist()) for each, n in zip(everyone, lengths)]


def together(peers: Peers, action: Callable[[], bytes]) -> list[bytes]:
    """Do something on every process, and return what each made of it.

    Raises:
        CheckpointError: it failed on one of them; everywhere, each with its own failure or with the first other one's.
    """
    failure: Exception | None = None
    with peers.at_work():
        try:
            mine = b"+" + action()
        except Exception as error:
            failure, mine = error, b"-" + str(error).encode(errors="backslashreplace")
    everyone = peers.gather(mine)
    if failure is not None:
        raise failure
    for rank, given in enumerate(everyone):
        if given[:1] == b"-":
            raise CheckpointError(f"rank {rank}: {given[1:].decode()}")
    return [given[1:] for given in everyone]
