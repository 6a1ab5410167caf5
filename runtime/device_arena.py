"""Arenas on accelerators: what one local worker uses there, in memory that the parent owns.

The parent allocates it, so that weights and gradients outlive a worker, and the optimizer in the parent works where the
worker computes. On CUDA the worker opens the same memory by CUDA IPC.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .accelerators import SHARED_MEMORY, Opener
from .arena import Slot, laid_out


class DeviceArena:
    """A block of an accelerator's memory with tensors at known places."""

    def __init__(self, memory: torch.Tensor, slots: dict[str, Slot]) -> None:
        self.slots = slots
        self._memory = memory

    @classmethod
    def create(cls, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> DeviceArena:
        """Allocate room for each named tensor; nothing is copied yet."""
        slots, n_bytes = laid_out(tensors)
        return cls(SHARED_MEMORY[device.type].allocate(n_bytes, device), slots)

    def opener(self) -> Opener:
        """Say how one more process opens it."""
        return SHARED_MEMORY[self._memory.device.type].share(self._memory)

    @classmethod
    def open(cls, opener: Opener, slots: dict[str, Slot]) -> DeviceArena:
        """Use what another process has created."""
        function, arguments = opener
        return cls(function(*arguments), slots)

    def view(self, name: str) -> torch.Tensor:
        """Return the tensor at ``name``, with a storage of its own, as the views of an :class:`Arena` have."""
        slot = self.slots[name]
        own = self._memory.untyped_storage()[slot.offset : slot.offset + slot.n_bytes]
        return torch.empty(0, dtype=slot.dtype, device=self._memory.device).set_(own, 0, slot.shape, slot.strides)
