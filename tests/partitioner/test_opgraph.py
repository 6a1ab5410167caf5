"""The op graph: what must stay together, and what a cut costs."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stagecut.partitioner.analysis import analyse
from stagecut.partitioner.capture import capture
from stagecut.partitioner.cluster import Cluster, Device, DeviceKind, Link
from stagecut.partitioner.costs.analytic import analytic_costs
from stagecut.partitioner.cut import CutDevice, solve
from stagecut.partitioner.describe import describe
from stagecut.partitioner.opgraph import STATE_COPIES, op_graph
from stagecut.partitioner.pricing import Pricer
from stagecut.structure import is_encodable

KIND = DeviceKind("cpu", {"float32": 1e9}, 1e9, 1e-6, 1e12, "made up")
LINK = Link(1e-5, 1e8, "made up")
CLUSTER = Cluster((Device("cpu", KIND), Device("cpu", KIND)), None, LINK, LINK)


def graph_of(model: nn.Module, *args: torch.Tensor) -> nx.DiGraph:
    caught = capture(model, args)
    facts = analyse(caught, list(args), args[0].shape[0])
    costs = {KIND.name: analytic_costs(caught.graph_module, facts, KIND)}
    travels = {name: is_encodable(own.value) for name, own in facts.items()}
    return op_graph(caught, facts, costs, CLUSTER, travels)


def joined(graph: nx.DiGraph) -> list[set[str]]:
    """The groups that share a stage, overlapping ones united."""
    together = nx.Graph()
    for group in graph.graph["together"]:
        nx.add_path(together, group)
    return [set(group) for group in nx.connected_components(together)]


class Function(nn.Module):
    """A model whose forward is given as a function."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def layers(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(3, 3) for name in names}


def test_a_model_without_writes_can_be_cut_everywhere() -> None:
    graph = graph_of(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), torch.randn(4, 3))
    assert list(graph.nodes) == ["_0", "_1", "_2"]
    assert list(graph.edges) == [("_0", "_1"), ("_1", "_2")]
    assert graph.graph["together"] == []


def test_an_inplace_activation_stays_with_what_it_overwrites_and_its_reader_need_not() -> None:
    graph = graph_of(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)), torch.randn(4, 3))
    assert joined(graph) == [{"_0", "_1"}]


def test_readers_up_to_the_last_write_stay_and_later_ones_may_leave() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        early = y * 2
        view = y.view(-1, 3)
        y += 1
        late = self.b(y)
        return F.relu_(early) + view + late

    assert joined(graph_of(Function(forward, **layers("a", "b")), torch.randn(4, 3))) == [
        {"a", "mul", "view", "add_", "relu_"}
    ]


def test_an_assignment_to_a_slice_stays_with_the_tensor() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y[:, 0] = 0
        return self.b(y)

    assert joined(graph_of(Function(forward, **layers("a", "b")), torch.randn(4, 3))) == [{"a", "setitem"}]


def test_an_input_that_is_overwritten_keeps_all_its_readers() -> None:
    """Every stage is given its own copy of the input, and only one of them is written."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        early = self.a(x)
        x.mul_(2)
        return self.b(early) + x

    assert joined(graph_of(Function(forward, **layers("a", "b")), torch.randn(4, 3))) == [{"a", "mul_", "add"}]


def test_a_buffer_that_is_overwritten_keeps_all_its_readers() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return self.b(self.a(x)) * self.seen

    model = Function(forward, **layers("a", "b"))
    model.register_buffer("seen", torch.zeros(3))
    (group,) = joined(graph_of(model, torch.randn(4, 3)))
    assert group == {"add_", "mul"}


def test_a_batchnorm_that_is_called_twice_stays_on_one_stage() -> None:
    model = Function(lambda self, x: self.norm(self.a(self.norm(x))), norm=nn.BatchNorm1d(3), **layers("a"))
    assert joined(graph_of(model, torch.randn(4, 3))) == [{"norm", "norm_1"}]


class Handle:
    """A value of a class that no packet can carry, and that keeps its tensor out of sight."""

    __slots__ = ("value",)

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Wraps(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        torch._assert(bool(x.numel()), "never empty")
        return Handle(x) if x.sum() > -1e9 else x


class Unwraps(nn.Module):
    def forward(self, handle: Any) -> torch.Tensor:
        return handle.value * 2 if handle.value.sum() > -1e9 else handle.value


@pytest.mark.filterwarnings("ignore:stagecut. shapes cannot be known")
def test_a_value_that_cannot_travel_keeps_its_users_with_it() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        handle = self.wraps(self.a(x))
        return self.b(self.first(handle)) + self.second(handle)

    model = Function(forward, wraps=Wraps(), first=Unwraps(), second=Unwraps(), **layers("a", "b"))
    caught = capture(model, (torch.randn(4, 3),))
    assert sorted(call.path for call in caught.opaque) == ["first", "second", "wraps"]
    assert joined(graph_of(model, torch.randn(4, 3))) == [{"wraps", "check_form", "first", "second"}]


class BasicBlock(nn.Module):
    """torchvision's residual block, in-place activations and additions included."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def test_residual_blocks_that_work_in_place_can_be_cut_inside_and_between() -> None:
    graph = graph_of(nn.Sequential(*(BasicBlock(4) for _ in range(4))), torch.randn(2, 4, 6, 6))
    groups = joined(graph)
    assert len(groups) == 8
    assert max(len(group) for group in groups) == 3  # bn2, the addition, the second activation
    devices = [CutDevice(f"stage {s}", "cpu") for s in range(4)]
    cut = solve(graph, devices, ordered=True, in_flight=[1] * 4)
    assert set(cut.stage_of.values()) == {0, 1, 2, 3}
    for group in groups:
        assert len({cut.stage_of[name] for name in group}) == 1


def test_parameters_are_charged_once_with_gradients_and_optimizer_state() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)
            self.register_buffer("offset", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.frozen(self.b(self.a(x))) + self.offset

    graph = graph_of(Tied(), torch.randn(4, 3))
    assert dict(graph.nodes(data="memory_bytes")) == {"a": 0, "b": 0, "frozen": 36, "add": 12}
    tied = {"nodes": ["a", "b"], "memory_bytes": 36 * STATE_COPIES, "gradient_bytes": 36, "stash_bytes": 0}
    assert tied in graph.graph["shared"]
    assert graph.graph["ties"] == {"a.weight": ("a", "b")}
    assert graph.nodes["add"]["op"].parameters == ("offset",)


def test_a_value_costs_its_bytes_once_for_all_readers_and_twice_with_a_gradient() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        chosen = y.argmax(dim=1, keepdim=True)
        return self.b(y).gather(1, chosen) + y

    graph = graph_of(Function(forward, **layers("a", "b")), torch.randn(4, 3))
    prices = {transfer["nodes"][0]: transfer for transfer in graph.graph["transfers"]}
    assert set(prices["a"]["nodes"]) == {"a", "argmax", "b", "add"}
    assert prices["a"]["seconds"] == pytest.approx(2 * 4 * 3 * 4 / 1e8)
    assert prices["argmax"]["seconds"] == pytest.approx(4 * 8 / 1e8)
    assert "add" not in prices


def test_compute_is_forward_and_backward_of_the_op() -> None:
    x = torch.randn(4, 3)
    caught = capture(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), (x,))
    facts = analyse(caught, [x], 4)
    costs = analytic_costs(caught.graph_module, facts, KIND)
    graph = op_graph(caught, facts, {KIND.name: costs}, CLUSTER, dict.fromkeys(facts, True))
    for name, attributes in graph.nodes(data=True):
        cost = costs[name]
        assert attributes["compute_s"] == {"cpu": cost.forward_s + cost.backward_s}
        assert cost.forward_s > 0
        assert cost.source == "analytic"
        assert attributes["stash_bytes"] == attributes["op"].saved_bytes


def test_every_kind_of_the_cluster_has_its_own_seconds() -> None:
    x = torch.randn(4, 3)
    caught = capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (x,))
    priced = Pricer(caught, [x], describe("sim:2xH100+2xL4+1xA100"), "analytic").at(4)
    assert set(priced.costs) == {"H100-80GB", "L4-24GB", "A100-80GB"}
    for name, data in priced.graph.nodes(data=True):
        assert set(data["compute_s"]) == {"H100-80GB", "L4-24GB", "A100-80GB"}
        assert data["compute_s"]["H100-80GB"] < data["compute_s"]["A100-80GB"] < data["compute_s"]["L4-24GB"]
        other = priced.costs["L4-24GB"][name]
        assert data["compute_s"]["L4-24GB"] == other.forward_s + other.backward_s
