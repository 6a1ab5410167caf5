"""Activation recompute: a stage keeps its inputs, and its backward computes the rest again.

The method of Chen et al., 2016 (https://arxiv.org/abs/1604.06174), by torch's non-reentrant checkpoint. The second
forward is the first one again: random ops are seeded by microbatch and name, and buffers that the first one changed
(running statistics) are put back after the second, so that they change once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import StageError
from ..structure import tensors_in
from .seeding import Seed


def recomputed(module: nn.Module, forward: Callable[..., Any], seed: Seed, m: int, values: list[Any]) -> dict[str, Any]:
    """Return ``forward(*values)``, which is ``module``'s, for microbatch ``m``, with only ``values`` kept.

    Raises:
        StageError: the stage changes one of its inputs in place, so that it cannot be computed again.
    """
    given = [(tensor, tensor._version) for tensor in tensors_in(values)]
    results: dict[str, Any] = checkpoint(
        _Again(module, forward, seed, m), *values, use_reentrant=False, preserve_rng_state=False
    )
    if any(tensor._version != version for tensor, version in given):
        raise StageError(
            "this stage changes one of its inputs in place, so its activations cannot be computed again",
            hint="plan it without recompute: stagecut.compile(..., recompute=False)",
        )
    return results


class _Again:
    """A stage's forward that can be run twice for one microbatch."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], seed: Seed, m: int) -> None:
        self.module, self.forward, self.seed, self.m = module, forward, seed, m
        self.n_runs = 0

    def __call__(self, *values: Any) -> Any:
        self.n_runs += 1
        if self.n_runs == 1:
            return self.forward(*values)
        now = self.seed.microbatch
        kept = [(buffer, buffer.detach().clone()) for buffer in self.module.buffers()]
        self.seed.microbatch = self.m
        try:
            return self.forward(*values)
        finally:  # torch ends a second run by an exception as soon as it has all that it needs
            self.seed.microbatch = now
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.data.copy_(value)  # batch norm saved the buffer: its version must not move
