"""Random ops draw numbers that depend on step, microbatch and name alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stagecut
from stagecut.partitioner.analysis import analyse
from stagecut.runtime.seeding import Seed


def drawn(base: int, microbatch: int, name: str) -> list[float]:
    seed = Seed()
    seed.base, seed.microbatch = base, microbatch
    seed.apply(name)
    return torch.rand(3).tolist()


def test_numbers_follow_from_step_microbatch_and_name_alone() -> None:
    first = drawn(1, 2, "drop")
    torch.rand(5)
    assert drawn(1, 2, "drop") == first
    assert first not in (drawn(2, 2, "drop"), drawn(1, 3, "drop"), drawn(1, 2, "other"))


def test_numbers_are_those_after_torch_manual_seed() -> None:
    Seed().apply("drop")
    state = torch.get_rng_state()
    torch.manual_seed(torch.initial_seed())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator may be in use")
def test_without_an_accelerator_nothing_is_queued_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed formats the stack for every kind of accelerator: 1.4 ms for each random op."""
    called: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", called.append)
    Seed().apply("drop")
    assert not called


class Attention(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.project, self.drop = p, nn.Linear(8, 8), nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(self.project(x))
        return nn.functional.scaled_dot_product_attention(h, h, h, dropout_p=self.p)


def test_only_ops_that_drop_something_are_seeded() -> None:
    x = torch.randn(4, 2, 5, 8)
    random = {}
    for p in (0.0, 0.1):
        facts = analyse(stagecut.capture(Attention(p), (x,)), [x], 4)
        random[p] = {name for name, own in facts.items() if own.random}
    assert random == {0.0: set(), 0.1: {"drop", "scaled_dot_product_attention"}}
