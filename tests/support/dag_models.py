"""Random DAG models, random cuts, and the unsplit reference, for the exactness tests and benchmarks/parity.py."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.partitioner.capture import capture
from stagecut.partitioner.configurations import Wishes
from stagecut.partitioner.describe import describe
from stagecut.partitioner.placing import Groups, owners_of, placed, placement_of
from stagecut.partitioner.planner import make_plan
from stagecut.partitioner.pricing import Pricer
from stagecut.partitioner.recording.state import caches_found_once
from stagecut.partitioner.reorder import with_orders
from stagecut.runtime.instructions import Action
from stagecut.runtime.schedules import ANY_REPLICAS, GIVEN, TRAINING_SCHEDULES, Orders, least_microbatches
from stagecut.runtime.schedules.families import FAMILIES

WIDTH = 4
T = TypeVar("T")


class Chooser(Protocol):
    """Where the choices come from: hypothesis in tests, a seeded generator in the benchmark."""

    def choose(self, options: Sequence[T]) -> T:
        """Pick one of ``options``."""


class RandomChooser:
    """Choices from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, options: Sequence[T]) -> T:
        return self._random.choice(options)


UNARY = (
    "linear",
    "frozen",
    "again",
    "tied",
    "relu",
    "relu_",
    "tanh",
    "norm",
    "half",
    "detach",
    "sized",
    "mask",
    "kept",
    "heads",
)
BINARY = ("add", "mul", "cat", "where", "sub_")


@dataclass(frozen=True)
class Op:
    """One op of a random model: its kind, the earlier values that it uses, and a number for its parameters."""

    kind: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class DagSpec:
    """A random model as data: inputs, ops, which values it returns, and which of them the loss uses."""

    n_inputs: int
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    in_loss: tuple[int, ...]


def draw_spec(chooser: Chooser, *, max_ops: int = 9) -> DagSpec:
    """Draw a model; op i may use any input or earlier op, so there are skips, fan-out and dead ends."""
    n_inputs = chooser.choose([1, 1, 2, 3])
    n_ops = chooser.choose(range(2, max_ops + 1))
    ops = [Op("linear", (0,))]
    for _ in range(n_ops):
        kind = chooser.choose(UNARY + BINARY)
        count = 2 if kind in BINARY else 1
        known = list(range(n_inputs + len(ops)))
        ops.append(
            Op(
                kind,
                tuple(chooser.choose(known[-4:] if chooser.choose([True, False]) else known) for _ in range(count)),
            )
        )
    ops.append(Op("linear", (n_inputs + len(ops) - 1,)))
    values = list(range(n_inputs, n_inputs + len(ops)))
    extra = [chooser.choose(values) for _ in range(chooser.choose([0, 0, 1, 2]))]
    outputs = tuple(dict.fromkeys([values[-1], *extra]))
    in_loss = tuple(v for v in outputs if v == values[-1] or chooser.choose([True, False]))
    return DagSpec(n_inputs, tuple(ops), outputs, in_loss)


class TwoHeads(nn.Module):
    """A module that returns a tuple of a tensor, a dict and a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
        return self.first(x), {"second": self.second(x)}, 0.5


class Opaque(nn.Module):
    """A module that branches on data, so it is kept whole and receives and returns containers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: tuple[torch.Tensor, float]) -> torch.Tensor:
        x, factor = pair
        if float(x.detach().sum()) > 1e9:
            return x
        return self.linear(x) * factor


class DagModel(nn.Module):
    """The model of a :class:`DagSpec`. All values are (batch, 4); the result is a dict of lists."""

    def __init__(self, spec: DagSpec) -> None:
        super().__init__()
        self.spec = spec
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Parameter(torch.ones(3))
        self.layers = nn.ModuleDict()
        self.register_buffer("scale", torch.full((WIDTH,), 0.7))
        for index, op in enumerate(spec.ops):
            layer: nn.Module | None = None
            if op.kind in ("linear", "frozen"):
                layer = nn.Linear(WIDTH, WIDTH)
                layer.requires_grad_(op.kind == "linear")
            elif op.kind == "norm":
                layer = nn.LayerNorm(WIDTH)
            elif op.kind == "cat":
                layer = nn.Linear(2 * WIDTH, WIDTH)
            elif op.kind == "heads":
                layer = nn.ModuleDict({"heads": TwoHeads(), "opaque": Opaque()})
            if layer is not None:
                self.layers[str(index)] = layer

    def forward(self, first: torch.Tensor, *, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        values = [first, *(extra["more"] if extra is not None else [])]
        for index, op in enumerate(self.spec.ops):
            values.append(self._apply_op(index, op.kind, [values[i] for i in op.inputs]))
        return {"constant": 3, "values": [values[i] for i in self.spec.outputs]}

    def _apply_op(self, index: int, kind: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        x = inputs[0]
        if kind in ("linear", "frozen", "norm"):
            return self.layers[str(index)](x)
        if kind == "again":
            return self.shared(x)
        if kind == "tied":
            return F.linear(x, self.shared.weight.t())
        if kind == "relu":
            return F.relu(x)
        if kind == "relu_":
            return F.relu_(x * 1.5)
        if kind == "tanh":
            return torch.tanh(x)
        if kind == "half":
            return torch.chunk(x, 2, dim=1)[0].repeat(1, 2)
        if kind == "detach":
            return x.detach() * 0.5 + x
        if kind == "sized":
            return x.reshape(x.size(0), -1) / x.shape[1]
        if kind == "mask":
            return x.masked_fill(x.detach() < 0, 0.1)
        if kind == "kept":
            return x * self.scale
        if kind == "heads":
            a, b, factor = self.layers[str(index)]["heads"](x)
            return self.layers[str(index)]["opaque"]((a, factor)) + b["second"] * factor
        y = inputs[1]
        if kind == "add":
            return x + y
        if kind == "mul":
            return x * torch.sigmoid(y)
        if kind == "cat":
            return self.layers[str(index)](torch.cat([x, y], dim=1))
        if kind == "where":
            return torch.where(y > 0, x, y)
        fresh = x + 0.0
        fresh -= y
        return fresh


@dataclass(frozen=True)
class Loss:
    """Mean over rows of a function of some of the outputs; sent to workers, so a plain object."""

    used: tuple[int, ...]

    def __call__(self, output: dict[str, Any], target: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [((output["values"][i] - target["y"]) ** 2).sum(dim=1) * target["w"] for i in self.used]
        return torch.stack(parts).sum(dim=0).mean()


@dataclass(frozen=True)
class Case:
    """A model with a batch and a way to cut and run it."""

    model: DagModel
    args: tuple[torch.Tensor, ...]
    kwargs: dict[str, Any]
    target: dict[str, torch.Tensor]
    loss: Loss
    plan: stagecut.Plan


def draw_case(
    chooser: Chooser,
    *,
    max_ops: int = 9,
    max_stages: int = 4,
    replicas: Sequence[int] = (1,),
    devices: Sequence[str] = ("cpu",),
) -> Case:
    """Draw model, batch size, cut, replica counts, microbatches, schedule, and where each worker computes."""
    with caches_found_once():  # as in stagecut.plan; there are many objects to look at in a test run
        return _draw_case(chooser, max_ops, max_stages, replicas, devices)


def _draw_case(
    chooser: Chooser, max_ops: int, max_stages: int, replicas: Sequence[int], devices: Sequence[str]
) -> Case:
    spec = draw_spec(chooser, max_ops=max_ops)
    torch.manual_seed(chooser.choose(range(1000)))
    model = DagModel(spec).double()
    rows = chooser.choose([1, 2, 3, 5, 8, 11])
    args, kwargs, target = make_batch(spec, rows)
    loss = Loss(tuple(i for i, v in enumerate(spec.outputs) if v in spec.in_loss))
    captured = capture(model, args, kwargs)
    stage_of, n_stages = _draw_cut(chooser, captured, args, kwargs, max_stages)
    placement = chooser.choose(["chain", "chain", "loop", "vee", "other"])
    groups = _draw_groups(chooser, placement, n_stages, replicas)
    n_microbatches = chooser.choose([1, 2, 3, 4])
    wishes = Wishes(
        n_microbatches=n_microbatches,
        schedule=chooser.choose(_schedules_for(groups, min(rows, n_microbatches * max(map(len, groups))))),
        recompute=chooser.choose([False, True]),
        costs="analytic",
        assignment=stage_of,
    )
    names = [devices[0] if len(devices) == 1 else chooser.choose(devices) for _ in range(1 + max(map(max, groups)))]
    cluster = describe(names).with_groups(groups)
    plan = make_plan(captured, _tensors(args, kwargs), cluster, wishes)
    if len(set(map(len, groups))) == 1 and chooser.choose([False, False, True]):
        chance = RandomChooser(chooser.choose(range(1000)))
        plan = with_orders(plan, GIVEN, draw_orders(chance, groups, n_microbatches))
    return Case(model, args, kwargs, target, loss, plan)


def draw_orders(chooser: Chooser, groups: Groups, n_microbatches: int) -> Orders:
    """Draw any order of one replica's workers in which nobody waits for ever."""
    owners, last = owners_of(groups), len(groups) - 1
    orders: list[list[Action]] = [[] for _ in owners]
    done: set[tuple[str, int, int]] = set()
    splits = {(s, m): chooser.choose([False, True]) for s in range(last + 1) for m in range(n_microbatches)}
    waiting = [(kind, s, m) for s, m in splits for kind in ("FIW" if splits[s, m] else "FB")]
    while waiting:
        able = [own for own in waiting if all(needed in done for needed in _needed(*own, last))]
        kind, s, m = chooser.choose(able)
        waiting.remove((kind, s, m))
        done.add(("back" if kind in "IB" else kind, s, m))
        orders[owners.index(groups[s])].append(Action(kind, s, m))
    return tuple(map(tuple, orders))


def _needed(kind: str, s: int, m: int, last: int) -> list[tuple[str, int, int]]:
    """List what a computation waits for, if values go from each stage to the next."""
    if kind == "F":
        return [("F", s - 1, m)] if s else []
    if kind == "W":
        return [("back", s, m)]
    return [("F", s, m), *([("back", s + 1, m)] if s < last else [])]


def _draw_groups(chooser: Chooser, placement: str, n_stages: int, replicas: Sequence[int]) -> Groups:
    """Draw the devices of each stage: of its own with any number of replicas, or shared with other stages."""
    if placement == "vee" and n_stages % 2 == 0:
        return placed(_owners([chooser.choose(replicas)] * (n_stages // 2)), "vee", 2)
    if placement == "loop" and n_stages > 1:
        n_chunks = chooser.choose([n for n in range(2, n_stages + 1) if n_stages % n == 0])
        return placed(_owners([chooser.choose(replicas)] * (n_stages // n_chunks)), "loop", n_chunks)
    if placement == "other" and n_stages > 1:
        owner = [chooser.choose(range(n_stages - 1)) for _ in range(n_stages)]
        known = list(dict.fromkeys(owner))
        owners = _owners([chooser.choose(replicas) for _ in known])
        return tuple(owners[known.index(own)] for own in owner)
    return _owners([chooser.choose(replicas) for _ in range(n_stages)])


def _owners(sizes: Sequence[int]) -> Groups:
    ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    return tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends))


def _schedules_for(groups: Groups, n_pieces: int) -> list[str]:
    """Name the schedules that allow stages on these devices, and so few microbatches."""
    owners, placement = owners_of(groups), placement_of(groups)
    if placement == "other":
        return ["fill-drain"]
    if len(groups) == 1 or len(set(map(len, groups))) > 1:
        return list(ANY_REPLICAS)
    return [
        name
        for name in TRAINING_SCHEDULES
        if FAMILIES[name].placement == placement
        and least_microbatches(name, len(owners)) <= max(1, n_pieces // len(owners[0]))
    ]


def make_batch(spec: DagSpec, rows: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any], dict[str, torch.Tensor]]:
    """Make arguments and targets with ``rows`` rows."""
    inputs = [torch.randn(rows, WIDTH, dtype=torch.float64) for _ in range(spec.n_inputs)]
    target = {"y": torch.randn(rows, WIDTH, dtype=torch.float64), "w": torch.rand(rows, dtype=torch.float64)}
    kwargs = {"extra": {"more": inputs[1:], "flag": True}} if spec.n_inputs > 1 else {}
    return (inputs[0],), kwargs, target


def _tensors(args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [*args, *(kwargs["extra"]["more"] if kwargs else [])]


def _draw_cut(
    chooser: Chooser, captured: stagecut.Capture, args: Any, kwargs: Any, max_stages: int
) -> tuple[dict[str, int], int]:
    """Draw stages that are convex and keep together what must be; any downset chain can come out."""
    graph = Pricer(captured, _tensors(args, kwargs), describe(["cpu"]), "analytic").at(args[0].shape[0]).graph
    stage_of = {name: chooser.choose(range(max_stages)) for name in graph}
    groups = graph.graph["together"]
    changed = True
    while changed:
        before = dict(stage_of)
        for name in graph:
            stage_of[name] = max([stage_of[name], *(stage_of[p] for p in graph.predecessors(name))])
        for group in groups:
            latest = max(stage_of[name] for name in group)
            stage_of.update(dict.fromkeys(group, latest))
        changed = stage_of != before
    used = sorted(set(stage_of.values()))
    return {name: used.index(stage) for name, stage in stage_of.items()}, len(used)


def reference(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Compute loss and gradients of the whole batch on a copy of the unsplit model, without stagecut."""
    model = copy.deepcopy(case.model)
    loss = case.loss(model(*case.args, **case.kwargs), case.target)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def worst_error(case: Case, loss: torch.Tensor, known: Any = None) -> float:
    """Return the largest relative error of loss and gradients of ``case.model`` against the reference.

    ``known`` is the reference, where it was computed before.
    """
    expected_loss, expected = known or reference(case)
    errors = [float((loss - expected_loss).abs() / expected_loss.abs().clamp_min(1e-12))]
    largest = max((float(g.abs().max()) for g in expected.values() if g is not None), default=0.0)
    for name, parameter in case.model.named_parameters():
        given, wanted = parameter.grad, expected[name]
        if (given is None) != (wanted is None):
            raise AssertionError(f"{name}: gradient {'missing' if given is None else 'unexpected'}")
        if given is not None and wanted is not None:
            given = given.to(wanted.device)
            errors.append(float((given - wanted).abs().max() / max(float(wanted.abs().max()), 1e-3 * largest, 1e-12)))
    return max(errors)


def random_problem(seed: int, max_ops: int = 8) -> tuple[DagModel, tuple[torch.Tensor, ...], dict[str, Any]]:
    """Draw a model with the arguments of a call: at most ``max_ops`` ops, up to 4,096 rows."""
    chooser = RandomChooser(seed)
    spec = draw_spec(chooser, max_ops=max_ops)
    torch.manual_seed(seed)
    rows = chooser.choose([1, 2, 5, 8, 64, 4096])
    inputs = [torch.randn(rows, WIDTH) for _ in range(spec.n_inputs)]
    return DagModel(spec), (inputs[0],), {"extra": {"more": inputs[1:], "flag": True}} if spec.n_inputs > 1 else {}
