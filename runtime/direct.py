"""Packets between accelerators without a detour over the CPU: bodies through NCCL, heads as ordinary packets.

NCCL carries messages of sizes that both ends know, and a pair of devices has one channel, in which everything happens
in order. So a packet is two: its head, which says shapes and sizes, goes as packets between CPUs go, and its body
is one block of the device's memory, which the receiver computes on. Sends and receives are issued where the program
has them; that no two workers wait for each other is what the checks of programs prove, for sends that wait for their
receive and for one channel in order per pair (program/lower.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .instructions import Instruction
from .packets import DevicePacket, Packed, decode, pack
from .transport import MessageKey, Transport, message_key

# By kind of device, the backend of torch.distributed that sends from one of them to another.
BACKENDS = {"cuda": "nccl"}


def direct_pairs(pairs: Sequence[tuple[int, int]], places: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """List the pairs of workers whose packets go from device to device.

    Args:
        pairs: (from, to) of workers between which packets travel.
        places: per worker, its machine and its device. NCCL refuses two ranks on one device.

    >>> direct_pairs([(0, 1), (1, 2), (2, 3)], [("m", "cuda:0"), ("m", "cuda:1"), ("m", "cuda:1"), ("m", "cpu")])
    [(0, 1)]
    """
    kinds = [_kind_of(name) for _, name in places]
    return [(a, b) for a, b in pairs if kinds[a] == kinds[b] and kinds[a] in BACKENDS and places[a] != places[b]]


def groups_of(
    pairs: Sequence[tuple[int, int]],
    places: Sequence[tuple[str, str]],
    make: Callable[[list[int], str], Any],
) -> dict[tuple[int, int], Any]:
    """Make the process groups of :func:`direct_pairs`, one for both ways: a call that all workers make alike.

    ``make(ranks, backend)`` makes one.
    """
    found = {}
    for a, b in dict.fromkeys((min(pair), max(pair)) for pair in direct_pairs(pairs, places)):
        found[a, b] = make([a, b], BACKENDS[_kind_of(places[a][1])])
    return found


def _kind_of(device: str) -> str:
    return device.partition(":")[0]


class DirectTransport:
    """Packets of one worker to and from peers on other accelerators; to and from all others by ``other``."""

    def __init__(
        self,
        worker: int,
        device: torch.device,
        groups: Mapping[tuple[int, int], Any],
        other: Transport,
    ) -> None:
        """Take all groups, by pair, and what carries heads, and the packets to and from everybody else."""
        self._group_of = {b if a == worker else a: group for (a, b), group in groups.items() if worker in (a, b)}
        self._device, self._other = device, other
        self._posted: dict[MessageKey, tuple[Any, DevicePacket]] = {}
        self._sending: list[tuple[Any, torch.Tensor]] = []

    def begin(self, receives: Sequence[Instruction], signature: tuple[int, ...]) -> None:
        """Start a step."""
        self._posted.clear()
        self._other.begin(list(receives), signature)

    def send(self, i: Instruction, packed: Packed) -> None:
        """Send the head, and start to send the body; it is kept until :meth:`end`."""
        group = self._group_of.get(i.peer_worker)
        if group is None:
            self._other.send(i, packed)
            return
        self._other.send(i, pack([packed.header], [False]))
        body = packed.write_body(torch.empty(packed.n_bytes, dtype=torch.uint8, device=self._device))
        self._sending.append((dist.isend(body, i.peer_worker, group=group), body))

    def post(self, i: Instruction) -> None:
        """Wait for the head, which is sent when the other's program has come there, and post the receive."""
        self._other.post(i)
        group = self._group_of.get(i.peer_worker)
        if group is None:
            return
        key = message_key(i)
        (header,), _ = decode(self._other.take(key), torch.device("cpu"))
        packet = DevicePacket.of(header, self._device)
        self._posted[key] = (dist.irecv(packet.body, i.peer_worker, group=group), packet)

    def ready(self, key: MessageKey) -> bool:
        """Between processes nobody asks; a worker simply waits."""
        raise NotImplementedError("a worker process waits in take()")

    def take(self, key: MessageKey) -> torch.Tensor | DevicePacket:
        """Return a packet; what the device does from now on waits for it."""
        if key not in self._posted:
            return self._other.take(key)
        work, packet = self._posted.pop(key)
        work.wait()
        return packet

    def end(self) -> None:
        """Finish a step: every send has left."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
        self._other.end()

    def close(self) -> None:
        """Give up the channels of the other packets."""
        close = getattr(self._other, "close", None)
        if close is not None:
            close()
