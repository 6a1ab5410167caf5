"""Arenas: parameters, buffers and gradients in memory that the parent and its workers share.

An arena is an anonymous file (``memfd``): it has no name that could be left behind, and it is gone with the last
process that maps it. Pages that nobody writes cost nothing.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from torch import nn

_ALIGN = 64


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in an arena."""

    offset: int
    n_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Arena:
    """A block of shared memory with tensors at known places."""

    def __init__(self, fd: int, n_bytes: int, slots: dict[str, Slot]) -> None:
        self.fd = fd
        self.n_bytes = n_bytes
        self.slots = slots
        self._map = mmap.mmap(fd, n_bytes)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def create(cls, tensors: Iterable[tuple[str, torch.Tensor]]) -> Arena:
        """Allocate room for each named tensor; nothing is copied yet."""
        slots: dict[str, Slot] = {}
        offset = 0
        for name, tensor in tensors:
            strides = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
            slots[name] = Slot(offset, tensor.numel() * tensor.element_size(), tensor.dtype, tuple(tensor.shape), strides)
            offset = -(-(offset + slots[name].n_bytes) // _ALIGN) * _ALIGN
        n_bytes = max(offset, _ALIGN)
        fd = _anonymous_file()
        os.ftruncate(fd, n_bytes)
        return cls(fd, n_bytes, slots)

    def view(self, name: str) -> torch.Tensor:
        """Return the tensor at ``name``; all views of all processes share one memory."""
        slot = self.slots[name]
        flat = self._bytes[slot.offset : slot.offset + slot.n_bytes].view(slot.dtype)
        return flat.as_strided(slot.shape, slot.strides)

    def close(self) -> None:
        """Give up the file; the memory lives as long as tensors over it do."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stagecut", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _StatePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle that replaces the model's own tensors by their names."""

    def __init__(self, file: io.BytesIO, names: dict[int, str]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = names

    def persistent_id(self, obj: Any) -> str | None:
        return self._names.get(id(obj)) if isinstance(obj, torch.Tensor) else None


class _StateUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, state: dict[str, torch.Tensor]) -> None:
        super().__init__(file)
        self._state = state

    def persistent_load(self, pid: str) -> torch.Tensor:
        return self._state[pid]


def dump_with_state(value: Any, names: dict[int, str]) -> bytes:
    """Pickle ``value``; tensors whose ``id`` is in ``names`` become references."""
    file = io.BytesIO()
    _StatePickler(file, names).dump(value)
    return file.getvalue()


def load_with_state(data: bytes, state: dict[str, torch.Tensor]) -> Any:
    """Unpickle what :func:`dump_with_state` made, with ``state`` in place of the references.

    Only ever called on bytes that this process's own parent wrote to its private socket.
    """
    return _StateUnpickler(io.BytesIO(data), state).load()


def parameter_over(view: torch.Tensor) -> nn.Parameter:
    """Make a parameter whose values are the shared memory of ``view``."""
    return nn.Parameter(view, requires_grad=view.is_floating_point() or view.is_complex())
