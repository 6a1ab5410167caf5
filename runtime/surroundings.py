"""What of a process changes what a model computes, beside the model: a worker takes it over from its parent."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Surroundings:
    """Settings of torch for the whole process, and where Python and relative paths look."""

    default_dtype: torch.dtype
    matmul_precision: str
    deterministic: bool
    deterministic_warn_only: bool
    search_path: tuple[str, ...]
    folder: str

    @classmethod
    def here(cls) -> Surroundings:
        """Describe this process."""
        return cls(
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            tuple(sys.path),
            os.getcwd(),
        )

    def take_over(self) -> None:
        """Make this process like the one that was described."""
        torch.set_default_dtype(self.default_dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        if now != (self.deterministic, self.deterministic_warn_only):  # the call alone imports Inductor: a second
            torch.use_deterministic_algorithms(self.deterministic, warn_only=self.deterministic_warn_only)
        sys.path[:] = self.search_path
        os.chdir(self.folder)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return what autocast computes with on a device of this kind now; None where it is off."""
    kind = torch.device(device).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
