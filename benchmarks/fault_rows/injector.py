"""An injector of faults: a module that misbehaves where a marked row passes, as often as it is told, and counts."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

MARK = 1313.0


class InjectedError(Exception):
    """What an injector raises."""


class _Fuse(torch.autograd.Function):
    """Fires in the backward of the microbatch that has the mark."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, injector: Injector) -> torch.Tensor:
        ctx.injector = injector
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        ctx.injector.fire()
        return gradient, None


class Injector(nn.Module):
    """Passes rows on; where one begins with more than ``MARK``, does what ``kind`` says, ``times`` times.

    The files in ``folder`` count, across processes. With ``backward`` it is the backward of the microbatch that fails.
    """

    def __init__(self, kind: str, folder: Path, *, times: int = 1, backward: bool = False) -> None:
        super().__init__()
        self.kind, self.folder, self.times, self.backward = kind, str(folder), times, backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x.detach()[:, 0] >= MARK).any()):
            if not self.backward:
                self.fire()
            elif x.requires_grad:
                return _Fuse.apply(x, self)  # type: ignore[no-any-return,no-untyped-call]
        return x * 1.0

    def fire(self) -> None:
        """Misbehave, unless that was done often enough."""
        if fired(Path(self.folder)) < self.times:
            Path(self.folder, f"fired-{fired(Path(self.folder))}").touch(exist_ok=False)
            self.do()

    def do(self) -> None:
        """Do what ``kind`` says."""
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.kind == "exit":
            os._exit(0)
        elif self.kind == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif self.kind == "hang":
            threading.Event().wait()
        elif self.kind == "raise":
            raise InjectedError("injected")
        elif self.kind == "memory":
            torch.empty(1 << 60, dtype=torch.uint8)
        else:
            raise ValueError(self.kind)


class RemoteInjector(Injector):
    """Does, once, what the file ``armed`` of its folder says when a marked row passes: ``kill in a backward``."""

    def __init__(self, folder: Path) -> None:
        super().__init__("none", folder)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        armed = Path(self.folder, "armed")
        if bool((x.detach()[:, 0] >= MARK).any()) and armed.exists():
            self.kind, _, where = armed.read_text().partition(" in a ")
            self.backward = where == "backward"
            return super().forward(x)
        return x * 1.0


def fired(folder: Path) -> int:
    """Count how often injectors of this folder fired."""
    return sum(1 for path in folder.iterdir() if path.name.startswith("fired-"))


class Watched(nn.Module):
    """A model with all that a step can change: BatchNorm, dropout, a shared weight; and an injector in its middle."""

    def __init__(self, injector: Injector) -> None:
        super().__init__()
        self.mark = nn.Identity()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.injector = injector
        self.drop = nn.Dropout(0.2)
        self.middle = nn.Linear(6, 6)
        self.late_norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        marked = self.injector(torch.cat([x[:, :1].detach(), h], dim=1))[:, 1:]
        return self.last(self.late_norm(torch.tanh(self.middle(self.drop(marked)))))


def batch(step: int, *, marked: bool = False, rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Make rows of numbers; with ``marked`` the fault comes in the microbatch that has the row before the last four."""
    made = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=made, dtype=torch.float64)
    x[:, 0] = x[:, 0].clamp(-1, 1)
    if marked:
        x[rows - 5, 0] = MARK
    return x, torch.randn(rows, 6, generator=made, dtype=torch.float64)
