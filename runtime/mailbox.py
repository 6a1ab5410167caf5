"""A mailbox: memory that a parent and one worker share, in which the tensors of their messages travel.

The two take turns: one writes a message and does not write again before the other has answered, who copies what it
wants to keep. A socket would carry a batch of 2 MB in pieces of 64 KB, each with two changes of process: 4 to 14 ms.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
import torch

from .arena import Slot, anonymous_file

LARGE_BYTES = 16 << 10  # smaller tensors are part of the message itself


@dataclass(frozen=True)
class Letter:
    """A tensor of a message, by its place in the mailbox."""

    slot: Slot
    requires_grad: bool


class Mailbox:
    """One end of it; the other end is a :class:`Mailbox` over the same file in the other process."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = anonymous_file("messages") if fd is None else fd
        self._used = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def start(self) -> None:
        """Begin a message, over the one before."""
        self._used = 0

    def put(self, tensor: torch.Tensor) -> Letter:
        """Write a dense CPU tensor, or a view that is made dense, and return where it lies."""
        letter = Letter(Slot.at(self._used, tensor), tensor.requires_grad)
        self._used = letter.slot.end
        self._reach(self._used)
        _copy(letter.slot.over(self._bytes), tensor.detach())
        return letter

    def get(self, letter: Letter) -> torch.Tensor:
        """Return a copy of a tensor of the message that was received last."""
        slot = letter.slot
        self._reach(slot.end)
        tensor = torch.empty_strided(slot.shape, slot.strides, dtype=slot.dtype)
        _copy(tensor, slot.over(self._bytes))
        return tensor.requires_grad_(letter.requires_grad)

    def _reach(self, n_bytes: int) -> None:
        """Map at least so many bytes; the file grows where it is too short."""
        if n_bytes <= self._bytes.numel():
            return
        if os.fstat(self.fd).st_size < n_bytes:
            os.ftruncate(self.fd, max(n_bytes, 2 * self._bytes.numel()))
        self._bytes = torch.frombuffer(mmap.mmap(self.fd, os.fstat(self.fd).st_size), dtype=torch.uint8)

    def close(self) -> None:
        """Give up the file; the memory goes with the last process that maps it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy as this thread: torch would start others, which go on spinning on cores that the workers want."""
    if source.stride() == target.stride() and not (source.is_conj() or source.is_neg()):
        n = source.numel()
        to, origin = (tensor.as_strided((n,), (1,)).view(torch.uint8).numpy() for tensor in (target, source))
        np.copyto(to, origin)
    else:
        target.copy_(source)
