"""Packets between worker processes of one machine: memory that both map, and a pipe that says what lies there.

The sender writes a packet into a room of the memory and announces it with one short write to the pipe, which wakes the
receiver. The receiver computes with the tensors where they lie. A room is free again when the last tensor over it is
gone, whoever held it: a stage's activations, autograd, or a module that keeps what it was given. So there are as many
rooms as packets were ever alive at once, and a sender never waits.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import StallError
from .accelerators import pin
from .arena import anonymous_file
from .instructions import Instruction, Layout
from .packets import Packed
from .transport import MessageKey, message_key

# Step, offset and size of the room, bytes of the packet, microbatch, stages from and to, whether it is a gradient.
_MESSAGE = struct.Struct("=QQQQIHH?3x")
_AT_ONCE = 64  # messages that are read from the pipe together
_DATA = 64  # where the packet begins in its room; the first byte of the room says whether it is in use
_ADDRESSES = 1 << 40  # of one channel
_IDLE_STEPS = 32  # after which an unused room's pages go back to the system
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class PeerGone(ConnectionError):
    """The process at the other end of a channel has ended."""


def channels_of(layout: Layout) -> list[tuple[int, int]]:
    """List the pairs (from, to) of different workers between which packets travel."""
    pairs = [*layout.wires, *((target, origin) for origin, target in layout.gradient_wires)]
    workers = layout.workers
    return sorted({(a, b) for s, t in pairs for a in workers[s] for b in workers[t] if a != b})


@dataclass(frozen=True)
class ChannelFiles:
    """The descriptors of one channel from worker ``origin`` to worker ``target``."""

    origin: int
    target: int
    memory: int
    receiving: int
    sending: int

    @classmethod
    def open(cls, origin: int, target: int) -> ChannelFiles:
        """Make the memory, without a name, and the pipe."""
        return cls(origin, target, anonymous_file("packets"), *os.pipe())

    def of(self, worker: int) -> tuple[int, int] | None:
        """Return the descriptors that a worker needs of it: the memory, and its end of the pipe."""
        if worker not in (self.origin, self.target):
            return None
        return self.memory, self.sending if worker == self.origin else self.receiving

    def close(self) -> None:
        """Close all of them here; who was sent them has its own."""
        for fd in (self.memory, self.receiving, self.sending):
            os.close(fd)


class _Memory:
    """The memory of a channel, as one end maps it. It has addresses for far more than is ever used; pages cost."""

    def __init__(self, fd: int, pins: bool) -> None:
        self._pins = pins
        os.ftruncate(fd, _ADDRESSES)
        self._map = mmap.mmap(fd, _ADDRESSES)
        if hasattr(mmap, "MADV_DONTDUMP"):
            self._map.madvise(mmap.MADV_DONTDUMP)
        self._bytes: _Bytes = np.frombuffer(self._map, dtype=np.uint8)
        os.close(fd)

    def room(self, offset: int, size: int) -> _Room:
        """Return the room at a place, which is asked for once."""
        over = self._bytes[offset : offset + size]
        if self._pins:
            pin(over.ctypes.data, size)
        return _Room(self, offset, over)

    def give_back(self, offset: int, size: int) -> None:
        """Let the system have the pages of a place, which is empty when it is used again."""
        if hasattr(mmap, "MADV_REMOVE"):
            self._map.madvise(mmap.MADV_REMOVE, offset, size)


class _Room:
    """A place for one packet at a time."""

    def __init__(self, memory: _Memory, offset: int, over: _Bytes) -> None:
        self._memory, self.offset, self._bytes = memory, offset, over
        self._guard: Any = None
        self.used_in = 0  # the step in which a packet was last written, 0 where the pages have been given back

    @property
    def size(self) -> int:
        """Return how many bytes it has."""
        return len(self._bytes)

    @property
    def is_free(self) -> bool:
        """Say whether nobody has use for what lies here."""
        return not self._bytes[0]

    def fill(self, packed: Packed) -> None:
        """Write a packet (the sender)."""
        self._bytes[0] = 1
        packed.write(torch.from_numpy(self._bytes[_DATA : _DATA + packed.n_bytes]))

    def packet(self, n_bytes: int) -> torch.Tensor:
        """Return the packet, with whose last tensor the room becomes free (the receiver)."""
        part = self._bytes[_DATA : _DATA + n_bytes]
        # A tensor's storage holds the array that it was made from, and nobody else does.
        self._guard = weakref.ref(part, partial(_release, self._bytes))
        return torch.from_numpy(part)

    def give_pages_back(self) -> None:
        """Let the system have the memory of a free room."""
        self._memory.give_back(self.offset, self.size)
        self.used_in = 0


def _release(room: _Bytes, _: Any) -> None:
    room[0] = 0


class Outbox:
    """The sender's end of a channel; it takes over the descriptors.

    With ``pins`` this process copies between the rooms and a GPU. If either end does, rooms must keep their pages
    (``keeps_pages``): a GPU would go on copying from and to those that were there when it was told of them.
    """

    def __init__(self, memory_fd: int, pipe_fd: int, *, pins: bool = False, keeps_pages: bool = False) -> None:
        self._memory, self._pipe, self._keeps_pages = _Memory(memory_fd, pins), pipe_fd, keeps_pages
        self._rooms: dict[int, list[_Room]] = {}
        self._end = 0

    def send(self, step: int, key: MessageKey, packed: Packed) -> None:
        """Write a packet into a free room and announce it."""
        room = self._room(packed.n_bytes)
        room.used_in = step
        room.fill(packed)
        gradient, origin, target, microbatch = key
        message = _MESSAGE.pack(step, room.offset, room.size, packed.n_bytes, microbatch, origin, target, gradient)
        try:
            os.write(self._pipe, message)
        except BrokenPipeError as error:
            raise PeerGone(f"the worker of stage {target} has ended") from error

    def _room(self, n_bytes: int) -> _Room:
        size = _room_size(n_bytes)
        rooms = self._rooms.setdefault(size, [])
        for room in rooms:
            if room.is_free:
                return room
        if self._end + size > _ADDRESSES:
            raise MemoryError(f"packets of {self._end + size:,} bytes at once, to one worker, are more than can be")
        rooms.append(self._memory.room(self._end, size))
        self._end += size
        return rooms[-1]

    def tidy(self, step: int) -> None:
        """Give back the pages of rooms that have not been of use for some steps."""
        if self._keeps_pages:
            return
        for room in (room for rooms in self._rooms.values() for room in rooms):
            if room.used_in and step - room.used_in > _IDLE_STEPS and room.is_free:
                room.give_pages_back()

    def close(self) -> None:
        """Give up the channel; the memory goes with the last tensor over it."""
        os.close(self._pipe)
        self._rooms.clear()


class Inbox:
    """The receiver's end of a channel; it takes over the descriptors.

    With ``timeout_s`` it waits no longer for a packet; without, somebody else watches it. With ``pins`` this process
    copies from the rooms to a GPU.
    """

    def __init__(self, memory_fd: int, pipe_fd: int, *, timeout_s: float | None = None, pins: bool = False) -> None:
        self._memory, self._pipe, self._timeout_s = _Memory(memory_fd, pins), pipe_fd, timeout_s
        self._rooms: dict[int, _Room] = {}
        self._arrived: dict[MessageKey, tuple[int, int, int, int]] = {}

    def take(self, step: int, key: MessageKey) -> torch.Tensor:
        """Wait for a packet of this step, and return it where it lies."""
        while key not in self._arrived:
            self._read(key)
        sent_in, offset, size, n_bytes = self._arrived.pop(key)
        if sent_in != step:
            raise RuntimeError(f"a packet of step {sent_in} came in step {step}, from stage {key[1]} to {key[2]}")
        if offset not in self._rooms:
            self._rooms[offset] = self._memory.room(offset, size)
        return self._rooms[offset].packet(n_bytes)

    def _read(self, key: MessageKey) -> None:
        if self._timeout_s is not None and not _has_data(self._pipe, self._timeout_s):
            what = "gradient" if key[0] else "activation"
            raise StallError(
                f"the {what} of microbatch {key[3]} from stage {key[1]} to stage {key[2]} did not come for "
                f"{self._timeout_s:.0f} s",
                hint="raise stagecut.compile(..., timeout_s=...) if one instruction may take that long",
            )
        # Writes of one message are atomic, so that reads of several end with a whole one.
        data = os.read(self._pipe, _AT_ONCE * _MESSAGE.size)
        if not data:
            raise PeerGone(f"the worker of stage {key[1]} has ended")
        for step, offset, size, n_bytes, microbatch, origin, target, gradient in _MESSAGE.iter_unpack(data):
            self._arrived[gradient, origin, target, microbatch] = (step, offset, size, n_bytes)

    def close(self) -> None:
        """Give up the channel; the memory goes with the last tensor over it."""
        os.close(self._pipe)
        self._rooms.clear()


def _has_data(fd: int, timeout_s: float) -> bool:
    """Wait until something can be read; select() would take no descriptor above 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))


class SharedMemoryTransport:
    """The channels of one worker, by the worker at the other end."""

    def __init__(
        self, worker_of: Callable[[int, int], int], inboxes: Mapping[int, Inbox], outboxes: Mapping[int, Outbox]
    ) -> None:
        """Take ``worker_of(stage, microbatch)`` and the channels."""
        self._worker_of = worker_of
        self._inboxes, self._outboxes = inboxes, outboxes
        self.peers = frozenset(inboxes) | frozenset(outboxes)
        self._step = 0

    def begin(self, receives: Sequence[Instruction], signature: tuple[int, ...]) -> None:
        """Start a step: every worker counts them alike."""
        self._step += 1
        if self._step % _IDLE_STEPS == 0:
            for outbox in self._outboxes.values():
                outbox.tidy(self._step)

    def send(self, i: Instruction, packed: Packed) -> None:
        """Write the packet where its receiver will use it."""
        self._outboxes[i.peer_worker].send(self._step, message_key(i), packed)

    def post(self, i: Instruction) -> None:
        """There is nothing to post: packets lie in memory of their own from the moment that they are sent."""

    def ready(self, key: MessageKey) -> bool:
        """Between processes nobody asks; a worker simply waits."""
        raise NotImplementedError("a worker process waits in take()")

    def take(self, key: MessageKey) -> torch.Tensor:
        """Wait for a packet."""
        _, origin, _, microbatch = key
        return self._inboxes[self._worker_of(origin, microbatch)].take(self._step, key)

    def end(self) -> None:
        """Finish a step; what was sent needs the sender no more."""

    def close(self) -> None:
        """Give up all channels."""
        for inbox in self._inboxes.values():
            inbox.close()
        for outbox in self._outboxes.values():
            outbox.close()


def _room_size(n_bytes: int) -> int:
    """Round up to whole pages and to one of eight sizes between powers of two, so that few kinds of rooms are made."""
    pages = -(-(n_bytes + _DATA) // mmap.PAGESIZE)
    step = 1 << max(0, pages.bit_length() - 4)
    return -(-pages // step) * step * mmap.PAGESIZE
