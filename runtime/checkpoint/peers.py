"""The processes that write one checkpoint together: what one of them fails at, all of them hear of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ...errors import CheckpointError


class Peers(Protocol):
    """Who writes: one process, or the ranks of torchrun."""

    rank: int

    def gather(self, mine: bytes) -> list[bytes]:
        """Return what every process gave, by rank; all of them call it."""


class Alone:
    """One process."""

    rank = 0

    def gather(self, mine: bytes) -> list[bytes]:
        """Return what this process gave."""
        return [mine]


class Ranks:
    """The ranks of torchrun, over a group of their own, so that a thread can use it beside training."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self._group: Any = dist.new_group(backend="gloo")

    def gather(self, mine: bytes) -> list[bytes]:
        """Return what every rank gave."""
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
