"""How much memory a process of a pipeline takes, asked of the system, so that the process need not do anything."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Resident:
    """The process that a worker lives in.

    Attributes:
        pid: its number.
        memory_bytes, peak_memory_bytes: what it holds now and held at most: allocated by torch on a CUDA device, else
            resident memory, pages that it shares with other processes included. None where the system does not say.
    """

    pid: int
    memory_bytes: int | None = None
    peak_memory_bytes: int | None = None


def resident(device: str, pid: int | None = None) -> Resident:
    """Ask about a worker on ``device`` in this process, or in another one on this machine."""
    own = torch.device(device)
    if pid is None and own.type == "cuda":
        return Resident(os.getpid(), torch.cuda.memory_allocated(own), torch.cuda.max_memory_allocated(own))
    pid = os.getpid() if pid is None else pid
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # no such file on this system, or the process has ended
        return Resident(pid)
    # Not getrusage(): a process starts with the peak of the one that started it.
    found = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS:", "VmHWM:")))
    return Resident(pid, _bytes_of(found.get("VmRSS")), _bytes_of(found.get("VmHWM")))


def _bytes_of(text: str | None) -> int | None:
    return None if text is None else int(text.split()[0]) * 1024
