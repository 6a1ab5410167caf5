"""Accelerators of this machine: memory on them that local workers and their parent use, and waiting for kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing import reductions

# How another process opens memory: called with the arguments, it returns the tensor. Both travel in a pickle.
Opener = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]


@dataclass(frozen=True)
class SharedMemory:
    """How a kind of accelerator has memory that two processes use.

    ``allocate(n_bytes, device)`` makes it, ``share`` says how one other process opens it: asked again for each.
    """

    allocate: Callable[[int, torch.device], torch.Tensor]
    share: Callable[[torch.Tensor], Opener]


def _bytes_on(n_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device=device)


# By kind of device. CUDA: https://docs.pytorch.org/docs/stable/multiprocessing.html#sharing-cuda-tensors
SHARED_MEMORY = {"cuda": SharedMemory(_bytes_on, reductions.reduce_tensor)}


def is_accelerator(device: str | torch.device) -> bool:
    """Say whether it is something else than a CPU."""
    return torch.device(device).type != "cpu"


def of(devices: Iterable[str]) -> tuple[torch.device, ...]:
    """List the accelerators among some devices, each once."""
    return tuple(torch.device(name) for name in dict.fromkeys(devices) if is_accelerator(name))


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until accelerators have done all that this process told them."""
    for device in devices:
        torch.accelerator.synchronize(device)


def use(device: torch.device) -> None:
    """Let this process's kernels run on ``device`` unless they are told otherwise."""
    if is_accelerator(device):
        torch.accelerator.set_device_index(device.index or 0)


def pin(address: int, n_bytes: int) -> bool:
    """Let CUDA copy from and to memory of the CPU without a detour; pages that are pinned must stay where they are.

    Returns:
        Whether it does; memory that cannot be pinned works too, more slowly.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return False
    return int(torch.cuda.cudart().cudaHostRegister(address, n_bytes, 0)) == 0  # type: ignore[no-untyped-call]
