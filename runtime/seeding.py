"""Random numbers that depend on the step, the microbatch and the op, and on nothing else."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..randomness import accelerator_in_use


class Seed:
    """The seed that random ops of the current microbatch mix with their own name.

    ``recording`` is called instead of seeding while somebody records what a stage does.
    """

    def __init__(self) -> None:
        self.base = 0
        self.microbatch = 0
        self.recording: Callable[[str], None] | None = None

    def apply(self, name: str) -> None:
        """Seed this process's generators for the op ``name``."""
        if self.recording is not None:
            self.recording(name)
            return
        mixed = zlib.crc32(f"{self.base}/{self.microbatch}/{name}".encode())
        _seed_all((self.base << 32 | mixed) & 0x7FFF_FFFF_FFFF_FFFF)


def _seed_all(seed: int) -> None:
    """Seed every generator that is in use.

    ``torch.manual_seed`` would also queue the seed for accelerators that nobody has used yet, and format the stack for
    each: 1.4 ms a call.
    """
    torch.default_generator.manual_seed(seed)
    if accelerator_in_use() is not None:
        torch.manual_seed(seed)


class MethodCall:
    """Call a tensor method by name (picklable, unlike a lambda)."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the method of ``owner``."""
        return getattr(owner, self.method)(*args, **kwargs)


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
