"""Eager 1F1B: 1F1B with a longer warm-up, so that transfers have time to arrive.

Zhuang et al., 2022 (https://arxiv.org/abs/2211.05322). Stage s of p holds at most 2 (p - s) - 1 microbatches instead of
p - s; without transfers the bubble is that of 1F1B, and transfers of up to a forward and a backward are hidden.
"""

from __future__ import annotations

from .one_way import Unit, warm_then_alternate


def order(position: int, n_workers: int, n_microbatches: int) -> list[Unit]:
    """Return one worker's forwards and backwards."""
    return warm_then_alternate(2 * (n_workers - position) - 1, n_microbatches)
