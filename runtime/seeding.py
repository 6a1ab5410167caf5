"""Random numbers that depend on the step, the microbatch and the op, and on nothing else."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Seed:
    """The seed that random ops of the current microbatch mix with their own name."""

    def __init__(self) -> None:
        self.base = 0
        self.microbatch = 0

    def apply(self, name: str) -> None:
        """Seed this process's generators for the op ``name``."""
        mixed = zlib.crc32(f"{self.base}/{self.microbatch}/{name}".encode())
        torch.manual_seed((self.base << 32 | mixed) & 0x7FFF_FFFF_FFFF_FFFF)


class Seeded(nn.Module):
    """Run a random op under its own seed, so that its numbers do not depend on where or when it runs."""

    def __init__(self, seed: Seed, name: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self._seed = seed
        self._name = name
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Seed and call."""
        self._seed.apply(self._name)
        return self.function(*args, **kwargs)
