"""LayerDrop: calls that a random number makes or leaves out are one op that looks at the number at every run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few_rows import rows
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stagecut
from stagecut.partitioner.capture import Capture, capture
from stagecut.runtime.program.calls import Skippable

pytestmark = pytest.mark.usefixtures("warnings_are_errors")
SEEDS = tuple(range(6))


def layer() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.3))


class Layers(nn.Module):
    """Layers between two others, called as ``function`` says."""

    def __init__(self, function: Callable[..., torch.Tensor], n_layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.layers = nn.ModuleList(layer() for _ in range(n_layers))
        self.last = nn.Linear(3, 3)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self, self.first(x)))


def as_wav2vec2(self: Layers, h: torch.Tensor) -> torch.Tensor:
    for inner in self.layers:
        skip = self.training and torch.rand([]) < 0.5
        if not skip:
            h = inner(h)
    return h


def as_m2m_100(self: Layers, h: torch.Tensor) -> torch.Tensor:
    for inner in self.layers:
        to_drop = False
        if self.training:
            probability = torch.rand([])
            if probability < 0.5:
                to_drop = True
        if not to_drop:
            h = h + inner(h)
    return h


def kept_above(self: Layers, h: torch.Tensor) -> torch.Tensor:
    for inner in self.layers:
        if not self.training or torch.rand(1) > 0.5:
            h = inner(h)
    return h


def with_results_of_none(self: Layers, h: torch.Tensor) -> torch.Tensor:
    for inner in self.layers:
        drop = self.training and torch.rand(()) < 0.4
        outputs: tuple[Any, Any] = (None, None) if drop else (inner(h), None)
        h = h if drop else outputs[0]
    return h


def with_sizes(self: Layers, h: torch.Tensor) -> torch.Tensor:
    for inner in self.layers:
        if self.training and torch.rand([]) < 0.5:
            continue
        split = inner(h).view(h.shape[0], 3, -1)
        if split.shape[0] * split.shape[1] > 1:
            h = split.reshape(split.shape[0], -1)
    return h


def last_layer_twice(self: Layers, h: torch.Tensor) -> torch.Tensor:
    if not (self.training and torch.rand([]) < 0.5):
        h = self.layers[0](h)
        h = h + self.layers[0](h)
    return h


OPENED = [as_wav2vec2, as_m2m_100, kept_above, with_results_of_none, with_sizes, last_layer_twice]


def caught(function: Callable[..., torch.Tensor]) -> Capture:
    found = capture(Layers(function), (rows(),))
    check = found.verify((rows(),), seeds=SEEDS, rows=7)
    assert check.ok, str(check)
    return found


@pytest.mark.parametrize("function", OPENED)
def test_layers_that_are_left_out_at_random_are_ops_of_their_own(function: Callable[..., torch.Tensor]) -> None:
    found = caught(function)
    assert found.opaque == ()
    skipped = [module for module in found.graph_module.children() if isinstance(module, Skippable)]
    assert len(skipped) == (1 if function is last_layer_twice else 3)


@pytest.mark.parametrize("function", [as_wav2vec2, kept_above])
def test_what_is_left_out_differs_from_seed_to_seed(function: Callable[..., torch.Tensor]) -> None:
    found = caught(function)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found.model.zero_grad()
        found.module(rows()).sum().backward()
        weights = [inner[0].weight for inner in found.model.layers]
        seen.add(tuple(weight.grad is None for weight in weights))
    assert len(seen) > 4


def both_sides_compute(self: Layers, h: torch.Tensor) -> torch.Tensor:
    return self.layers[0](h) if torch.rand([]) < 0.5 else self.layers[1](h)


def counts_in_python(self: Layers, h: torch.Tensor) -> torch.Tensor:
    count = 0
    for inner in self.layers:
        if torch.rand([]) < 0.5:
            count += 1
            h = inner(h)
    return h * (count + 1)


def two_values(self: Layers, h: torch.Tensor) -> torch.Tensor:
    other = h
    for inner in self.layers:
        if not (self.training and torch.rand([]) < 0.5):
            h, other = inner(other), h
    return h + other


def forks_within(self: Layers, h: torch.Tensor) -> torch.Tensor:
    if torch.rand([]) < 0.5:
        h = self.layers[0](h)
        if torch.rand([]) < 0.5:
            h = self.layers[1](h)
    return h


def under_a_checkpoint(self: Layers, h: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda x: as_wav2vec2(self, x), h, use_reentrant=False)


def shortens(self: Layers, h: torch.Tensor) -> torch.Tensor:
    """As Informer distils: a layer that is made halves the length, and what follows has other sizes."""
    h = h[:, None, :].expand(h.shape[0], 8, 3)
    for inner in self.layers[:2]:
        if not torch.rand([]) < 0.5:
            h = F.max_pool1d(inner(h).transpose(1, 2), 2).transpose(1, 2)
    return h.reshape(h.shape[0], -1).view(h.shape[0], h.shape[1], 3).mean(1)


def looks_at_data(self: Layers, h: torch.Tensor) -> torch.Tensor:
    return self.layers[0](h) if h.sum() > 0 else h


@pytest.mark.parametrize(
    "function",
    [both_sides_compute, counts_in_python, two_values, forks_within, under_a_checkpoint, shortens, looks_at_data],
)
def test_other_branches_on_random_numbers_and_data_are_kept_whole(function: Callable[..., torch.Tensor]) -> None:
    found = capture(nn.Sequential(nn.Linear(3, 3), Layers(function)), (rows(),))
    assert [call.name for call in found.opaque] == ["1"]
    assert "branches on a tensor's data" in found.opaque[0].reason
    assert found.verify((rows(),), seeds=SEEDS, rows=7).ok


def checkpointed(self: Layers, h: torch.Tensor) -> torch.Tensor:
    for inner in self.layers:
        h = checkpoint(inner, h, use_reentrant=False)
    return h


@pytest.mark.parametrize("launch", ["inline", "local"])
@pytest.mark.parametrize("function", [as_wav2vec2, checkpointed])
@pytest.mark.usefixtures("no_workers_left")
def test_a_pipeline_runs_them(function: Callable[..., torch.Tensor], launch: str) -> None:
    warnings.simplefilter("ignore")  # of the costs
    model, x = Layers(function).double(), rows(8).double()
    with stagecut.compile(
        model, [["cpu"], ["cpu"]], loss_fn=F.mse_loss, example_inputs=(x,), launch=launch, microbatches=2
    ) as pm:
        for _ in range(4):
            pm.step(x, target=x)
        assert pm.verify(x, target=x).ok
        pm.eval()
        torch.testing.assert_close(pm(x), model.eval()(x), rtol=1e-12, atol=1e-14)
