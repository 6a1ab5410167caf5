"""Arenas: parameters, buffers and gradients in memory that the parent and its workers share.

An arena is an anonymous file (``memfd``): it has no name that could be left behind, and it is gone with the last
process that maps it. Pages that nobody writes cost nothing.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn

_ALIGN = 64


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in a block of memory, and how it is to be read."""

    offset: int
    n_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def at(cls, offset: int, tensor: torch.Tensor) -> Slot:
        """Describe a place for a tensor; a view of something larger becomes dense there."""
        strides = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
        return cls(offset, tensor.numel() * tensor.element_size(), tensor.dtype, tuple(tensor.shape), strides)

    @property
    def end(self) -> int:
        """Return where the next slot may begin."""
        return -(-(self.offset + self.n_bytes) // _ALIGN) * _ALIGN

    def over(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the tensor that lies here in a block of bytes."""
        return memory[self.offset : self.offset + self.n_bytes].view(self.dtype).as_strided(self.shape, self.strides)


def laid_out(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[dict[str, Slot], int]:
    """Give each named tensor a place in one block; return the places and the block's size."""
    slots: dict[str, Slot] = {}
    offset = 0
    for name, tensor in tensors:
        slots[name] = Slot.at(offset, tensor)
        offset = slots[name].end
    return slots, offset + _ALIGN


class Arena:
    """A block of shared memory with tensors at known places."""

    def __init__(self, fd: int, n_bytes: int, slots: dict[str, Slot]) -> None:
        self.fd = fd
        self.n_bytes = n_bytes
        self.slots = slots
        self._map = mmap.mmap(fd, n_bytes)

    @classmethod
    def create(cls, tensors: Iterable[tuple[str, torch.Tensor]]) -> Arena:
        """Allocate room for each named tensor; nothing is copied yet."""
        slots, n_bytes = laid_out(tensors)
        fd = anonymous_file("state")
        os.ftruncate(fd, n_bytes)
        return cls(fd, n_bytes, slots)

    def view(self, name: str) -> torch.Tensor:
        """Return the tensor at ``name``; all views of all processes share one memory."""
        # Each has a storage of its own: whoever saves or compiles one tensor must not meet all the others, and views of
        # one tensor share a version counter, so that autograd would take a buffer's update for a change of all.
        slot = self.slots[name]
        own = torch.frombuffer(self._map, dtype=torch.uint8, count=max(slot.n_bytes, 1), offset=slot.offset)
        return Slot(0, slot.n_bytes, slot.dtype, slot.shape, slot.strides).over(own).data

    def bytes_of(self, names: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Return the memory of tensors that lie side by side, in that order."""
        slots = [self.slots[name] for name in names]
        assert all(first.end == second.offset for first, second in pairwise(slots))
        start, end = (slots[0].offset, slots[-1].offset + slots[-1].n_bytes) if slots else (0, 0)
        return np.frombuffer(self._map, dtype=np.uint8)[start:end]

    def close(self) -> None:
        """Give up the file; the memory lives as long as tensors over it do."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def anonymous_file(what: str) -> int:
    """Make a file without a name, which goes with its last holder; memory maps show ``what`` it is for."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"stagecut-{what}", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def parameter_over(view: torch.Tensor) -> nn.Parameter:
    """Make a parameter whose values are the shared memory of ``view``."""
    return nn.Parameter(view, requires_grad=view.is_floating_point() or view.is_complex())
