"""The device of each rank of torchrun, as each rank says it of its own."""

from __future__ import annotations

import os

import torch

from ..errors import DeviceError
from .checkpoint.peers import Ranks
from .groups import ensure_process_group

RANKS = "ranks"


def rank_devices(timeout_s: float) -> list[str]:
    """List the devices of all ranks, by rank: a call that all ranks make.

    A rank has the accelerator of its number on its machine, or the CPU where there is no accelerator.

    Raises:
        DeviceError: a machine has more ranks than accelerators.
    """
    ensure_process_group(timeout_s)
    problem: DeviceError | None = None
    try:
        own = _own_device()
    except DeviceError as error:
        problem, own = error, "!"
    everyone = [given.decode() for given in Ranks(timeout_s).gather(own.encode())]
    if problem is not None:
        raise problem
    if "!" in everyone:
        raise DeviceError(f"rank {everyone.index('!')} has no device")
    return everyone


def _own_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return "cpu"
    count, local = torch.accelerator.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if local >= count:
        raise DeviceError(
            f"rank {local} of this machine has no accelerator of its own: there are {count}",
            hint=f"torchrun --nproc-per-node {count}, or name each rank's device: devices=['cuda:0', 'cpu', ...]",
        )
    return f"{accelerator.type}:{local}"
