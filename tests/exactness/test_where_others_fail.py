"""Cases in which torch.distributed.pipelining 2.13 crashes, hangs or does work over again: here they are exact."""

from __future__ import annotations

import copy
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stagecut
from stagecut.partitioner.configurations import Wishes
from stagecut.partitioner.describe import describe
from stagecut.partitioner.planner import make_plan
from stagecut.runtime.local import LocalEngine

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS = 10  # in 4 microbatches of 3, 3, 2 and 2


class Layouts(nn.Module):
    """Sends transposed, expanded and channels_last values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.last = nn.Conv2d(4, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.unflatten(1, (2, 4, 4)).to(memory_format=torch.channels_last)
        deep = self.conv(pixels)
        turned, spread = deep.transpose(2, 3), self.scale.expand(4, 4, 4)
        return self.last((turned * spread).tanh()).flatten(1)


class BeginsInPlace(nn.Module):
    """What may be the first op of a stage changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            x.relu_()
        return x


class UsedTwice(nn.Module):
    """A weight that two ops of one stage use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.twice(self.twice(self.first(x)).tanh())
        return result


class Recurrent(nn.Module):
    """An LSTM between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(4, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.lstm(self.first(x.unflatten(1, (8, 4))))[0]).flatten(1)
        return result


class Mixed(nn.Module):
    """Passes a dict with an int, a None and tensors on; a skip has two later consumers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        skip = self.layers[0](x).tanh()
        state: dict[str, Any] = {"x": self.layers[1](skip), "scale": 2, "mask": None}
        deep = self.layers[2](state["x"] + skip) * state["scale"]
        return {"out": self.layers[3](deep) + skip, "mask": state["mask"], "rows": 3}


class Around(nn.Module):
    """A value that goes to the next stage, and is kept for the backward of an op on its own stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        around = torch.tanh(self.first(x))
        result: torch.Tensor = around + self.last(self.middle(around).tanh())
        return result


class Checkpointed(nn.Module):
    """Recomputes blocks of its own accord, and counts how often they run."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.runs = 0

    def _block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return torch.tanh(self.blocks[index](x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(3):
            x = checkpoint(self._block, index, x, use_reentrant=False)
        return x


def loss_of(output: Any, target: Any) -> torch.Tensor:
    found = output["out"] if isinstance(output, dict) else output
    wanted = target["y"] if isinstance(target, dict) else target
    return F.mse_loss(found, wanted[:, : found.shape[1]])


MODELS = {cls.__name__: cls for cls in (Layouts, BeginsInPlace, UsedTwice, Recurrent, Mixed, Checkpointed)}


@pytest.mark.parametrize("schedule", ["fill-drain", "1f1b", "zb-h1", "zb-v"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_exact_in_every_step(name: str, schedule: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, y = torch.randn(ROWS, 32, dtype=torch.float64), torch.randn(ROWS, 32, dtype=torch.float64)
    stages = 4 if schedule == "zb-v" else 2
    options: dict[str, Any] = {"microbatches": 4, "costs": "analytic", "launch": "inline", "schedule": schedule}
    try:
        pm = stagecut.compile(model, ["cpu", "cpu"], loss_fn=loss_of, stages=stages, example_inputs=(x,), **options)
    except stagecut.PlanError:
        too_few = ("UsedTwice", "Recurrent", "BeginsInPlace") if stages == 4 else ()
        assert name in ("Checkpointed", *too_few), "there are places to cut at"
        pm = stagecut.compile(model, ["cpu"], loss_fn=loss_of, microbatches=4, costs="analytic", launch="inline")
    with pm:
        for _ in range(2):
            assert pm.verify(x, target={"y": y}).worst <= 1e-10
            pm.step(x[:7], target={"y": y[:7]})


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_value_that_leaves_a_stage_may_be_used_on_it_too(schedule: str) -> None:
    """The peer detaches what leaves a stage in place, and its backward in two parts then misses the graph of it."""
    torch.manual_seed(0)
    model = Around().double()
    x, y = torch.randn(ROWS, 32, dtype=torch.float64), torch.randn(ROWS, 32, dtype=torch.float64)
    captured = stagecut.capture(model, (x,))
    names = [node.name for node in captured.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    stage_of = {name: int(index > 2) for index, name in enumerate(names)}
    wishes = Wishes(n_microbatches=4, schedule=schedule, costs="analytic", assignment=stage_of)
    plan = make_plan(captured, [x], describe([["cpu"], ["cpu"]]), wishes)
    assert [wire.value for wire in plan.wires] == ["tanh", "middle"]
    assert next(op for op in plan.ops if op.name == "middle").inputs == ("tanh",)
    with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=F.mse_loss, plan=plan, launch="inline") as pm:
        for _ in range(3):
            assert pm.verify(x, target=y).worst <= 1e-10
            pm.step(x[:7], target=y[:7])


def test_checkpointed_blocks_run_twice_a_microbatch_and_not_more() -> None:
    model = Checkpointed()
    x = torch.randn(8, 32)
    with stagecut.compile(model, ["cpu"], loss_fn=F.mse_loss, microbatches=4, costs="analytic", launch="inline") as pm:
        pm.prepare(x)
        model.runs = 0
        pm.step(x, target=x)
        assert model.runs == 2 * 3 * 4


def test_hooks_on_weights_are_called_once_a_microbatch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    calls: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: calls.append(name))  # type: ignore[misc]
    x = torch.randn(8, 4)
    for schedule in ("1f1b", "zb-h1"):
        options: dict[str, Any] = {"microbatches": 4, "schedule": schedule, "costs": "analytic", "launch": "inline"}
        with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=F.mse_loss, **options) as pm:
            for _ in range(3):
                calls.clear()
                pm.step(x, target=x)
                assert sorted(calls) == sorted(4 * [name for name, _ in model.named_parameters()])


def test_an_autocast_region_may_come_and_go_between_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    x = torch.randn(8, 8)
    with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=F.mse_loss, microbatches=2, costs="analytic") as pm:
        for inside in (True, False, True, False):
            pm.zero_grad()
            plain.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                pm.step(x, target=x)
                for rows in x.chunk(2):
                    (F.mse_loss(plain(rows), rows) / 2).backward()
            for ours, theirs in zip(pm.parameters(), plain.parameters()):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_replicas_under_fill_drain_step_again_and_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).double()
    x = torch.randn(12, 8, dtype=torch.float64)
    options: dict[str, Any] = {"microbatches": 2, "schedule": "fill-drain", "costs": "analytic"}
    with stagecut.compile(model, [["cpu", "cpu"], ["cpu"]], loss_fn=F.mse_loss, **options) as pm:
        for rows in (12, 12, 11, 12):
            pm.step(x[:rows], target=x[:rows])
            assert pm.verify(x, target=x).worst <= 1e-10


def test_memory_for_packets_is_that_of_what_is_in_flight() -> None:
    """1F1B on two stages has two microbatches in flight, however many there are."""
    model = nn.Sequential(nn.Linear(64, 4096), nn.Tanh(), nn.Linear(4096, 64))
    held = {}
    for n in (4, 16):
        x = torch.randn(4 * n, 64)
        options: dict[str, Any] = {"microbatches": n, "schedule": "1f1b", "costs": "analytic"}
        with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=F.mse_loss, **options) as pm:
            for _ in range(4):
                pm.step(x, target=x)
            assert isinstance(pm._engine, LocalEngine)
            processes = [psutil.Process(worker.process.pid) for worker in pm._engine.pool.workers]
            maps = [known for process in processes for known in process.memory_maps() if "packets" in known.path]
            held[n] = sum(known.rss for known in maps)
    packet_bytes = min(4 * 64 * 4, 4 * 4096 * 4)
    assert held[4] >= packet_bytes
    assert held[16] <= 1.3 * held[4], held
