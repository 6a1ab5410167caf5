"""What is asked of a checkpoint, and what comes back: plain records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MODEL, RANDOM = "model", "random"


@dataclass(frozen=True)
class Placement:
    """Which tensors of a model this process writes, by file, and which it holds.

    ``files`` has the names of parameters and buffers; every name is in a file of one process.
    """

    files: Mapping[str, list[str]]
    holds: Callable[[str], bool]


@dataclass(frozen=True)
class Training:
    """What is saved and loaded beside the model; None for what a loop has none of."""

    optimizer: torch.optim.Optimizer | None = None
    scheduler: Any = None
    scaler: Any = None
    data: Any = None


@dataclass(frozen=True)
class Loaded:
    """What was loaded: the checkpoint, its step, what ``data`` was given, and the newer ones that were not whole.

    ``path`` is None, and ``step`` 0, where :meth:`Pipeline.resume` found no checkpoint and changed nothing.
    """

    path: Path | None
    step: int
    data: Any
    passed_over: tuple[str, ...]
