"""Ranks under torchrun that run on one machine: packets between them lie in shared memory, as local workers' do.

Each rank says where it runs. Who sends makes the channel (shared_memory.py) and hands its descriptors over a Unix
socket, whose name is random, and abstract: it leaves nothing behind. Packets to other machines go through
``torch.distributed``.
"""

from __future__ import annotations

import array
import json
import os
import secrets
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import StageError
from .accelerators import is_accelerator
from .direct import DirectTransport, groups_of
from .groups import make_group
from .instructions import Instruction, Layout
from .packets import DevicePacket, Packed
from .shared_memory import ChannelFiles, Inbox, Outbox, SharedMemoryTransport, channels_of
from .transport import DistTransport, MessageKey, Transport

_ADDRESS_BYTES = 512
_RANK = struct.Struct("=I")


def transport_of(layout: Layout, worker: int, devices: Sequence[str], group: Any, timeout_s: float) -> Transport:
    """Make what carries this rank's packets: a call that all ranks make.

    Args:
        layout: stages and wires; worker w is rank w.
        worker: this rank.
        devices: per rank, where it computes.
        group: a CPU process group of all ranks.
        timeout_s: how long a rank waits for a packet of a neighbour.
    """
    pinned = devices[worker].startswith("cuda")
    far = DistTransport(group, tuple(range(layout.n_workers)), layout.n_stages, pinned=pinned)
    with _Listener() as listener:
        own = listener.address if not is_accelerator(devices[worker]) else {"machine": ""}
        addresses = _exchanged({**own, "host": _machine() or socket.gethostname()}, layout.n_workers, group)
        mine = addresses[worker]["machine"]
        near = [pair for pair in channels_of(layout) if mine and all(addresses[w]["machine"] == mine for w in pair)]
        outboxes = {b: _connected(worker, b, addresses[b]["name"]) for a, b in near if a == worker}
        inboxes = listener.accepted({a for a, b in near if b == worker}, timeout_s)
    places = [(address["host"], device) for address, device in zip(addresses, devices)]
    groups = groups_of(channels_of(layout), places, lambda ranks, backend: make_group(ranks, backend, timeout_s))
    if any(worker in pair for pair in groups):
        return DirectTransport(worker, torch.device(devices[worker]), groups, far)
    if not outboxes and not inboxes:
        return far
    return RoutedTransport(SharedMemoryTransport(layout.worker_of, inboxes, outboxes), far, layout.worker_of)


class RoutedTransport:
    """Packets to and from ranks of this machine through shared memory, the others through ``torch.distributed``."""

    def __init__(self, near: SharedMemoryTransport, far: DistTransport, worker_of: Callable[[int, int], int]) -> None:
        self._near, self._far, self._worker_of = near, far, worker_of
        self._is_open = True

    def _of(self, worker: int) -> Transport:
        return self._near if worker in self._near.peers else self._far

    def begin(self, receives: list[Instruction], signature: tuple[int, ...]) -> None:
        """Start a step."""
        for transport in (self._near, self._far):
            transport.begin([i for i in receives if self._of(i.peer_worker) is transport], signature)

    def send(self, i: Instruction, packed: Packed) -> None:
        """Send by the way that there is to the receiver."""
        self._of(i.peer_worker).send(i, packed)

    def post(self, i: Instruction) -> None:
        """Post a receive where it has to be."""
        self._of(i.peer_worker).post(i)

    def ready(self, key: MessageKey) -> bool:
        """Between processes nobody asks; a worker simply waits."""
        raise NotImplementedError("a worker process waits in take()")

    def take(self, key: MessageKey) -> torch.Tensor | DevicePacket:
        """Wait for a packet."""
        return self._of(self._worker_of(key[1], key[3])).take(key)

    def end(self) -> None:
        """Finish a step: every send has left."""
        self._near.end()
        self._far.end()

    def close(self) -> None:
        """Give up the channels."""
        if self._is_open:
            self._near.close()
        self._is_open = False


def _machine() -> str:
    """Name the machine, and the network that its Unix sockets are in; empty where memory cannot be shared this way."""
    if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
        return ""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/net')} {os.getuid()}"
    except OSError:
        return ""


class _Listener:
    """The Unix socket on which this rank is handed the descriptors of channels to it."""

    def __enter__(self) -> _Listener:
        machine = _machine()
        self.address = {"machine": machine, "name": f"stagecut-{secrets.token_hex(16)}"}
        self._socket: socket.socket | None = None
        if machine:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(f"\0{self.address['name']}")
            self._socket.listen(socket.SOMAXCONN)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._socket is not None:
            self._socket.close()

    def accepted(self, origins: set[int], timeout_s: float) -> dict[int, Inbox]:
        """Wait for the channels from some ranks.

        Raises:
            StageError: they did not come in time.
        """
        found: dict[int, Inbox] = {}
        while origins - found.keys():
            assert self._socket is not None, "who has neighbours has a listener"
            self._socket.settimeout(timeout_s)
            try:
                connection, _ = self._socket.accept()
            except TimeoutError as error:
                raise StageError(
                    f"ranks {sorted(origins - found.keys())} of this machine did not open their channels in "
                    f"{timeout_s:.0f} s"
                ) from error
            with connection:
                connection.settimeout(timeout_s)
                origin, fds = _received(connection)
            found[origin] = Inbox(*fds, timeout_s=timeout_s)
        return found


def _received(connection: socket.socket) -> tuple[int, tuple[int, int]]:
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(_RANK.size, socket.CMSG_LEN(2 * fds.itemsize))
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: 2 * fds.itemsize])
    if len(data) != _RANK.size or len(fds) != 2:
        raise StageError("a neighbouring rank handed over no channel")
    return _RANK.unpack(data)[0], (fds[0], fds[1])


def _connected(worker: int, target: int, name: str) -> Outbox:
    """Make the channel to a rank and hand over its end of it."""
    files = ChannelFiles.open(worker, target)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{name}")
        socket.send_fds(connection, [_RANK.pack(worker)], [files.memory, files.receiving])
    os.close(files.receiving)
    return Outbox(files.memory, files.sending)


def _exchanged(address: dict[str, str], n_ranks: int, group: Any) -> list[dict[str, str]]:
    """Give every rank the addresses of all."""
    text = json.dumps(address).encode()
    own = torch.zeros(_ADDRESS_BYTES, dtype=torch.uint8)
    own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    everyone = [torch.empty_like(own) for _ in range(n_ranks)]
    dist.all_gather(everyone, own, group=group)
    return [json.loads(other.numpy().tobytes().rstrip(b"\0")) for other in everyone]
