"""A small model in whose middle something goes wrong for rows that carry a mark, and for no others."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional as F

import stagecut

MARK = 2000.0
ROWS, N_MICROBATCHES = 8, 4


class Spoil(nn.Module):
    """Does what ``kind`` says to a row that has the mark.

    ``"nan"`` and ``"inf"`` are made in the forward, ``"gradient"`` in the backward (that of a root of zero);
    ``"raise"`` raises; ``"spin"`` keeps the processor busy in every call but the first few.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.n_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "nan":
            return x.masked_fill(x == MARK, float("nan"))
        if self.kind == "inf":
            return x.masked_fill(x == MARK, float("inf"))
        if self.kind == "gradient":
            return torch.sqrt((x - MARK).abs())
        if self.kind == "raise" and bool((x.detach() == MARK).any()):
            raise ZeroDivisionError("a marked row")
        if self.kind == "spin":
            self.n_calls += 1
            end = time.perf_counter() + (0.02 if self.n_calls > 2 * N_MICROBATCHES else 0.0)
            while time.perf_counter() < end:
                pass
        return x


class Chain(nn.Module):
    """Layers before and after what is spoiled; the first ones hand the mark on as it is."""

    def __init__(self, kind: str, n_before: int = 2) -> None:
        super().__init__()
        self.before = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(n_before))
        for layer in self.before:
            nn.init.eye_(layer.weight)
        self.spoil = Spoil(kind)
        self.after = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.before:
            x = layer(x)
        x = self.spoil(x)
        for layer in self.after:
            x = layer(x)
        return x


def spoiled(kind: str, launch: str, n_stages: int = 3, n_before: int = 2, **wishes: object) -> stagecut.Pipeline:
    """Compile it; with three stages, or many layers before, what is spoiled is behind a boundary."""
    torch.manual_seed(0)
    return stagecut.compile(
        Chain(kind, n_before), [["cpu"]] * n_stages, loss_fn=F.cross_entropy, microbatches=N_MICROBATCHES,
        schedule="1f1b", costs="analytic", launch=launch, example_inputs=(torch.zeros(ROWS, 4),), opaque=("spoil",),
        **wishes,
    )  # type: ignore[arg-type]  # fmt: skip


def batch(*, marked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a batch; the mark is in microbatch 2."""
    x = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0))
    if marked:
        x[5, 0] = MARK
    return x, torch.zeros(ROWS, dtype=torch.long)


def stage_of_spoil(pm: stagecut.Pipeline) -> int:
    """Return the stage that the spoiled values leave."""
    return max(op.stage for op in pm.plan.ops if op.module_path.startswith("spoil"))
