"""Measured costs: every op that runs on made-up inputs is timed once, and kept."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from stagecut.partitioner.analysis import analyse
from stagecut.partitioner.capture import capture
from stagecut.partitioner.costs import measured
from stagecut.partitioner.costs.isolated import Isolated
from stagecut.partitioner.costs.measured import _Memory, measured_costs, touched_bytes
from stagecut.partitioner.costs.op_cost import OpCost
from stagecut.partitioner.cpu import this_cpu


class Mixed(nn.Module):
    """A weight used by a function, a layer, an expanded value, integers and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 16)
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.token = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.linear(self.embed(x), self.weight)  # (B, T, C)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], 1)
        return h.masked_fill(h < 0, 0.0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGECUT_CACHE", str(tmp_path))


def costs_of(model: nn.Module, x: torch.Tensor) -> dict[str, OpCost]:
    caught = capture(model, (x,))
    facts = analyse(caught, [x], x.shape[0])
    touched = touched_bytes(caught.graph_module, facts)
    return measured_costs(caught.graph_module, facts, this_cpu(), 1, touched_bytes=touched)


def test_every_op_is_timed_expanded_inputs_included() -> None:
    costs = costs_of(Mixed(), torch.randint(7, (64, 12)))
    timed = {name: cost for name, cost in costs.items() if cost.source == "measured"}
    assert timed.keys() >= {"embed", "linear", "cat", "masked_fill"}
    assert {cost.source for name, cost in costs.items() if name not in timed} == {"none"}
    assert all(cost.forward_s > 0 for cost in timed.values())


def test_the_part_for_parameters_is_a_part_of_the_backward() -> None:
    costs = costs_of(Mixed(), torch.randint(7, (64, 12)))
    assert all(0 <= cost.backward_weight_s <= cost.backward_s for cost in costs.values())
    assert costs["embed"].backward_weight_s == costs["embed"].backward_s > 0, "integers have no gradient"
    assert costs["masked_fill"].backward_weight_s == 0 < costs["masked_fill"].backward_s


def test_what_was_measured_is_kept_and_equal_layers_are_measured_once() -> None:
    x = torch.randn(8, 16)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    costs, again = costs_of(model, x), costs_of(model, x)
    layers = [name for name, cost in costs.items() if cost.source == "measured"]
    assert len(layers) == 5
    # The input of the first needs no gradient, so its backward is another one.
    assert len({costs[name].forward_s for name in layers}) <= 2
    assert all(again[name].source == "cached" for name in layers)
    assert all(again[name].forward_s == costs[name].forward_s for name in layers)


def test_costs_of_a_slower_or_faster_hour_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = torch.randn(8, 16), nn.Linear(16, 16)

    def source_at(compute: float, bandwidth: float) -> str:
        monkeypatch.setattr(measured, "pace", lambda: (compute * 1e11, bandwidth * 1e10))
        (source,) = {cost.source for cost in costs_of(model, x).values()} - {"none"}
        return source

    assert source_at(1.0, 1.0) == "measured"
    assert source_at(1.1, 0.8) == "cached"
    assert source_at(0.8, 1.0) == "measured"
    assert source_at(1.0, 1.0) == "measured", "the entry is of the slow hour now"
    assert source_at(1.0, 2.0) == "measured"


def test_a_file_that_cannot_be_read_is_measured_again_and_replaced(tmp_path: Path) -> None:
    x, model = torch.randn(8, 16), nn.Linear(16, 16)
    costs_of(model, x)
    (file,) = tmp_path.glob("costs-*.json")
    for broken in ("{", '{"op": [1, 2, 3]}', '{"op": [1, 2, 3, 0, 0]}'):
        file.write_text(broken)
        assert {cost.source for cost in costs_of(model, x).values()} == {"measured", "none"}
        assert {cost.source for cost in costs_of(model, x).values()} == {"cached", "none"}


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.project(x).chunk(3, -1)
        return torch.stack([first, second, third, x[:, :4]])


def test_made_up_inputs_share_memory_where_the_values_do() -> None:
    """As memory of their own, the parts of a projection would be timed colder than a step finds them."""
    x = torch.randn(5, 8)
    caught = capture(Parts(), (x,))
    facts = analyse(caught, [x], 5)
    (node,) = [n for n in caught.graph_module.graph.nodes if n.target is torch.stack]
    args, _ = Isolated(node, caught.graph_module, facts).inputs(_Memory(torch.device("cpu")).like)
    first, second, third, other = args[0]
    assert len({part.untyped_storage().data_ptr() for part in (first, second, third)}) == 1
    assert [part.storage_offset() for part in (first, second, third)] == [0, 4, 8]
    assert other.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    assert other.stride() == (8, 1)


def test_what_autograd_takes_to_start_is_no_op_s_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by one second at every look, an op with nothing but that start takes none."""
    ticks = itertools.count()
    monkeypatch.setattr(measured._Stopwatch, "now", lambda self: float(next(ticks)))
    caught = capture(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (torch.randn(3, 4),))
    facts = analyse(caught, [torch.randn(3, 4)], 3)
    (tanh,) = [node for node in caught.graph.nodes if node.name == "_1"]
    stopwatch = measured._Stopwatch(torch.device("cpu"), 1 << 12)
    assert stopwatch.engine_s == 1.0
    assert stopwatch.time(Isolated(tanh, caught.graph_module, facts), []) == (1.0, 0.0, 0.0)


def test_quick_ops_are_timed_as_recordings_run_them_and_others_as_autograd_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: dict[str, set[int]] = {}
    same: list[bool] = []
    record = measured._Run.record

    def noting(run: measured._Run) -> None:
        record(run)
        assert isinstance(run.isolated, Isolated)
        assert run.calls is not None
        whole, without = (run.back_calls[weights_too].run() for weights_too in (True, False))
        noted.setdefault(run.isolated.node.name, set()).add(len(whole) - len(without))
        result, expected = run.calls.run()[-1], run.function(*run.args, **run.kwargs)
        same.append(torch.equal(result, expected) and not result.requires_grad)
        if run.given:
            (gradient,) = torch.autograd.grad(expected, run.given, torch.ones_like(expected))
            same.append(any(torch.equal(gradient, found) for found in without))

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.hooked = nn.Linear(16, 16), nn.Linear(16, 16)
            self.hooked.register_full_backward_hook(lambda *given: None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.relu(self.hooked(self.first(x).tanh()).relu().sin(), inplace=True)

    monkeypatch.setattr(measured._Run, "record", noting)
    monkeypatch.setattr(measured, "_QUICK_S", 1.0)
    costs = costs_of(Layers(), torch.randn(8, 16))
    timed = {name for name, cost in costs.items() if cost.source == "measured"}
    kept = {name for name in timed if "hooked" in name}
    assert kept
    assert same
    assert all(same)
    assert noted.keys() < timed - kept, "one writes over its input"
    assert {"first", "tanh", "sin"} <= noted.keys()
    assert min(noted["first"]) > 0, "a layer's backward has products for its parameters"
    assert noted["tanh"] == {0}
    assert not any(count for name, counts in noted.items() if name != "first" for count in counts)

    noted.clear()
    monkeypatch.setattr(measured, "_QUICK_S", 0.0)
    costs_of(Layers(), torch.randn(4, 16))
    assert not noted
