"""Transports: how packets get from one worker to another."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .instructions import SENDS, Instruction, Op
from .packets import PREFIX_BYTES, DevicePacket, Packed, total_bytes

MessageKey = tuple[bool, int, int, int]
_AHEAD = 4
_FIRST_BYTES = 64


def message_key(i: Instruction) -> MessageKey:
    """Name the message that a send or receive is about: (is it a gradient, from stage, to stage, microbatch)."""
    gradient = i.op in (Op.SEND_GRAD, Op.RECV_GRAD)
    origin, target = (i.stage, i.peer_stage) if i.op in SENDS else (i.peer_stage, i.stage)
    return (gradient, origin, target, i.microbatch)


class Transport(Protocol):
    """What an executor needs to exchange packets, which are taken as 1-D uint8 CPU tensors, or where they arrived."""

    def begin(self, receives: list[Instruction], signature: tuple[int, ...]) -> None:
        """Start a step: ``receives`` in program order; ``signature[m]`` tells microbatches of equal shapes."""

    def send(self, i: Instruction, packed: Packed) -> None:
        """Write a packet where it can leave from; return without waiting for the other side."""

    def post(self, i: Instruction) -> None:
        """Tell that the program has reached the receive ``i``."""

    def ready(self, key: MessageKey) -> bool:
        """Say whether :meth:`take` would return at once (only transports within one process can tell)."""

    def take(self, key: MessageKey) -> torch.Tensor | DevicePacket:
        """Wait for a packet and return it."""

    def end(self) -> None:
        """Finish a step: every send has left."""


class InlineTransport:
    """Mailboxes shared by all workers of one process."""

    def __init__(self, mailbox: dict[MessageKey, torch.Tensor]) -> None:
        self._mailbox = mailbox

    def begin(self, receives: list[Instruction], signature: tuple[int, ...]) -> None:
        """Start a step; nothing to prepare."""

    def send(self, i: Instruction, packed: Packed) -> None:
        """Put the packet into the receiver's mailbox."""
        self._mailbox[message_key(i)] = packed.write(torch.empty(packed.n_bytes, dtype=torch.uint8))

    def post(self, i: Instruction) -> None:
        """Mailboxes need no posted receives."""

    def ready(self, key: MessageKey) -> bool:
        """Say whether the packet has been sent."""
        return key in self._mailbox

    def take(self, key: MessageKey) -> torch.Tensor:
        """Take the packet out."""
        return self._mailbox.pop(key)

    def end(self) -> None:
        """Finish a step; nothing to wait for."""


class DistTransport:
    """Packets over point-to-point messages of ``torch.distributed``, matched by tag (gloo).

    A packet is one message where its size is known: both ends expect the size that the first packet of the same kind
    had in an earlier step, and only what exceeds it follows as a second message. Receives are posted up to four
    ahead of the program, so a packet travels while its receiver still computes. ``pinned`` packets lie where CUDA
    copies from and to without a detour.
    """

    def __init__(self, group: Any, ranks: tuple[int, ...], n_stages: int, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._group = group
        self._ranks = ranks
        self._n_stages = n_stages
        self._expected: dict[tuple[bool, int, int, int], int] = {}
        self._observed: dict[tuple[bool, int, int, int], tuple[int, int]] = {}
        self._signature: tuple[int, ...] = ()
        self._to_post: deque[Instruction] = deque()
        self._posted: dict[MessageKey, tuple[Any, torch.Tensor, int]] = {}
        self._sending: list[tuple[Any, torch.Tensor]] = []

    def begin(self, receives: list[Instruction], signature: tuple[int, ...]) -> None:
        """Start a step and post the first receives."""
        self._signature = signature
        self._to_post = deque(receives)
        self._post_ahead(_AHEAD)

    def _post_ahead(self, count: int) -> None:
        while self._to_post and count > 0:
            i = self._to_post.popleft()
            key = message_key(i)
            buffer = self._room(self._size(key))
            rank = self._ranks[i.peer_worker]
            self._posted[key] = (dist.irecv(buffer, rank, group=self._group, tag=self._tag(key)), buffer, rank)
            count -= 1

    def post(self, i: Instruction) -> None:
        """Make sure that the receive ``i`` is posted (it mostly is, ahead of time)."""
        while message_key(i) not in self._posted:
            self._post_ahead(1)

    def send(self, i: Instruction, packed: Packed) -> None:
        """Start sending; the packet is kept until :meth:`end`."""
        key = message_key(i)
        first = self._size(key)
        self._observe(key, packed.n_bytes)
        rank = self._ranks[i.peer_worker]
        packet = self._room(max(first, packed.n_bytes))
        packed.write(packet[: packed.n_bytes])
        head = packet[:first]
        self._sending.append((dist.isend(head, rank, group=self._group, tag=self._tag(key)), head))
        if packet.numel() > first:
            rest = packet[first:]
            self._sending.append((dist.isend(rest, rank, group=self._group, tag=self._tag(key) + 1), rest))
        if len(self._sending) > 2 * _AHEAD:
            self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]

    def ready(self, key: MessageKey) -> bool:
        """Between processes nobody asks; a worker simply waits."""
        raise NotImplementedError("a worker process waits in take()")

    def take(self, key: MessageKey) -> torch.Tensor:
        """Wait for a packet."""
        work, buffer, rank = self._posted.pop(key)
        work.wait()
        self._post_ahead(1)
        total = total_bytes(buffer)
        self._observe(key, total)
        if total <= buffer.numel():
            return buffer[:total]
        packet = self._room(total)
        packet[: buffer.numel()] = buffer
        dist.recv(packet[buffer.numel() :], rank, group=self._group, tag=self._tag(key) + 1)
        return packet

    def end(self) -> None:
        """Wait until every send has left, and learn this step's sizes for the next one."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
        for kind, (_, size) in self._observed.items():
            self._expected[kind] = size
        self._observed.clear()

    def _room(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def _kind(self, key: MessageKey) -> tuple[bool, int, int, int]:
        gradient, origin, target, microbatch = key
        return (gradient, origin, target, self._signature[microbatch])

    def _size(self, key: MessageKey) -> int:
        return max(PREFIX_BYTES, self._expected.get(self._kind(key), _FIRST_BYTES))

    def _observe(self, key: MessageKey, size: int) -> None:
        kind, microbatch = self._kind(key), key[3]
        seen = self._observed.get(kind)
        if seen is None or microbatch < seen[0]:
            self._observed[kind] = (microbatch, size)

    def _tag(self, key: MessageKey) -> int:
        gradient, origin, target, microbatch = key
        return 2 * (((microbatch * 2 + int(gradient)) * self._n_stages + origin) * self._n_stages + target)
