"""The same stages for stagecut and for torch.distributed.pipelining: parts of one captured graph."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from even_stages import EvenStages, crossings
from rival_splits import by_places, legal_places
from torch import fx, nn

import stagecut
from stagecut.building import tensors_of
from stagecut.partitioner.analysis import analyse
from stagecut.partitioner.assemble import Decision, assemble
from stagecut.partitioner.cluster import Link
from stagecut.partitioner.describe import describe
from stagecut.partitioner.loss import Loss
from stagecut.partitioner.plan import Plan
from stagecut.partitioner.planner import random_ops
from stagecut.partitioner.pricing import Priced, Pricer
from stagecut.partitioner.simulate import StepCosts, Timeline, simulate
from stagecut.partitioner.split import split
from stagecut.runtime.instructions import Layout
from stagecut.runtime.program import lower
from stagecut.runtime.schedules import schedule
from stagecut.runtime.stage import Seed, build_module, input_names

Groups = tuple[tuple[int, ...], ...]
StageSeconds = tuple[float, float, float]  # forward, backward, and what of that makes gradients of weights
SPLIT_BACKWARD = frozenset({"interleaved-zero-bubble", "zb-v", "dualpipe-v"})  # where the peer splits backwards
_BYTES_PER_S = 1e9  # at which a worker moves values in the search for stages: some cost more to pass than they even out
_PARTS = 32  # that are timed by themselves
_ROUNDS, _WARM_UP = 12, 2


class StageModule(nn.Module):
    """One stage of a plan as the plain module that torch.distributed.pipelining takes: tensors in, tensors out."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.module = build_module(spec, Seed())
        self.names = input_names(spec)
        self.sends = tuple(value for group in spec.wires_out for value in group.values)
        self.results = self.sends or tuple(leaf.node for leaf in spec.outputs)

    def forward(self, *inputs: torch.Tensor) -> Any:
        results = self.module(*inputs)
        values = tuple(results[name] for name in self.results)
        return values[0] if len(values) == 1 else values


class _Watched(fx.Interpreter):
    """Names the values of a graph that are tensors of their own, with gradients and without strides of their own."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.sendable: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.requires_grad and not value._is_view() and value.is_contiguous():
            self.sendable.add(n.name)
        return value


def sendable(module: fx.GraphModule, x: torch.Tensor) -> set[str]:
    """Name the values of a graph that the peer sends and gets gradients of: contiguous, and no views."""
    watched = _Watched(copy.deepcopy(module))
    watched.run(x)
    return watched.sendable


def timeline(name: str, groups: Groups, n_microbatches: int) -> Callable[[Sequence[StageSeconds]], Timeline]:
    """Return what simulates a step of a chain of stages, given their seconds; nothing but compute takes time."""
    chain = tuple(pairwise(range(len(groups))))
    layout = Layout(groups, chain, chain)
    program = lower(name, layout, schedule(name, layout, n_microbatches), n_microbatches)
    nothing, link = dict.fromkeys(chain, 0.0), Link(0.0, 1.0, "none")

    def run(stages: Sequence[StageSeconds]) -> Timeline:
        forward, backward, weight = zip(*stages)
        rest = tuple(whole - part for whole, part in zip(backward, weight))
        costs = StepCosts(forward, backward, nothing, link, backward_input_s=rest, backward_weight_s=weight)
        return simulate(program, costs)

    return run


def seconds_of_parts(modules: Sequence[nn.Module], x: torch.Tensor) -> list[tuple[float, float]]:
    """Time the forward and the backward of each of a chain of modules between which one value passes; medians."""
    taken: list[list[tuple[float, float]]] = [[] for _ in modules]
    for _ in range(_ROUNDS):
        ends: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        value = x
        for module in modules:
            value = value.detach().requires_grad_(bool(ends))
            start = time.perf_counter()
            result = module(value)
            ends.append((value, result, time.perf_counter() - start))
            value = result
        gradient = torch.ones_like(value)
        for seconds, (value, result, forward_s) in zip(reversed(taken), reversed(ends)):
            start = time.perf_counter()
            torch.autograd.backward(result, gradient)
            seconds.append((forward_s, time.perf_counter() - start))
            gradient = value.grad
    forwards, backwards = zip(*(zip(*seconds[_WARM_UP:]) for seconds in taken))
    return list(zip(map(statistics.median, forwards), map(statistics.median, backwards)))


class Stages:
    """A model in stages that make a step at microbatches of ``rows`` rows short; the loss is on the last one.

    Ops take the time that stagecut measures of each by itself, times how much longer a part of the model takes, with
    autograd, than the sum of its ops: within a model caches are cold.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, rows: int, loss: Loss | None = None) -> None:
        self.captured = stagecut.capture(model, (x,))
        self.tensors = tensors_of(self.captured, (x,), {})
        self.batch_rows, self._rows, self._loss = x.shape[0], rows, loss
        (leaf,) = self.captured.trained.leaves
        self._result = str(leaf.node)
        self._travels = sendable(self.captured.graph_module, x[:rows])
        self._factors: dict[str, tuple[float, float]] = {}
        self._factors = self._beside_ops(x[:rows])

    def plan(self, groups: Groups, name: str, n_microbatches: int) -> Plan:
        """Plan for stages on the workers that ``groups`` name."""
        priced = self._priced(len({worker for group in groups for worker in group}))
        step = timeline(name, groups, n_microbatches)
        ops = [priced.costs["cpu"][name] for name in priced.graph]
        columns = zip(*((op.forward_s, op.backward_s, op.backward_weight_s) for op in ops))
        sums = [[0.0, *accumulate(column)] for column in columns]
        even = self._even(priced)
        loss_s = priced.loss_s["cpu"]
        moves = [before != after for before, after in pairwise(groups)]  # else both stages are on one worker

        def step_s(places: Sequence[int]) -> float:
            cuts = (0, *places, len(ops))
            moved = [sum(priced.ops[name].output_bytes for name in even.crossing[place]) for place in places]
            sent = [n_bytes / _BYTES_PER_S * away for n_bytes, away in zip(moved, moves)]
            ends = zip([*sent, loss_s[0]], [0.0, *sent[:-1], sent[-1] + loss_s[1]])
            stages = [tuple(s[end] - s[begin] for s in sums) for begin, end in pairwise(cuts)]
            return step([(f + a, b + c, w) for (f, b, w), (a, c) in zip(stages, ends)]).makespan_s

        places = even.search(len(groups), step_s, narrow=name in SPLIT_BACKWARD)
        return self._cut(priced, places, groups, name, n_microbatches)

    def equal(self, n_stages: int) -> list[StageModule]:
        """Return stages of nearly equal times between which one value passes, which any schedule of the peer runs.

        Raises:
            ValueError: there are not that many.
        """
        priced = self._priced(n_stages)
        places = self._even(priced).narrow(n_stages)
        if len(places) < n_stages - 1:
            raise ValueError(f"one value passes at {len(places)} places, which are not enough for {n_stages} stages")
        return self.modules(self._cut(priced, places, tuple((s,) for s in range(n_stages)), "fill-drain", 1))

    def modules(self, plan: Plan) -> list[StageModule]:
        """Return the plan's stages as modules for torch.distributed.pipelining."""
        facts = analyse(self.captured, self.tensors, self.batch_rows)
        modules = [StageModule(stage) for stage in split(self.captured, plan, random_ops(facts)).stages]
        if any(after.names != before.results for before, after in pairwise(modules)):
            raise ValueError("a stage takes other values than the one before it makes")
        return modules

    def _priced(self, n_workers: int) -> Priced:
        cluster = describe(["cpu"] * n_workers, 1)
        pricer = Pricer(self.captured, self.tensors, cluster, "measured", corrections=self._factors, loss=self._loss)
        return pricer.at(self._rows, 1)

    def _even(self, priced: Priced) -> EvenStages:
        seconds = [op.forward_s + op.backward_s for op in map(priced.costs["cpu"].__getitem__, priced.graph)]
        crossing = crossings(priced.ops, frozenset([self._result]))
        legal = [place for place in legal_places(priced.graph) if crossing[place] <= self._travels]
        return EvenStages(crossing, legal, seconds)

    def _cut(self, priced: Priced, places: Sequence[int], groups: Groups, name: str, n_microbatches: int) -> Plan:
        cluster = describe(["cpu"] * len({worker for group in groups for worker in group}), 1).with_groups(groups)
        stage_of = {str(name): s for name, s in by_places(priced.graph, places).items()}
        decision = Decision(cluster, stage_of, (False,) * len(groups), name, n_microbatches)
        return assemble(self.captured, priced, decision, self.batch_rows)

    def _beside_ops(self, x: torch.Tensor) -> dict[str, tuple[float, float]]:
        """Return by which factors the ops of each part take longer in the model, forward and backward."""
        priced = self._priced(1)
        places = self._even(priced).narrow(_PARTS)
        plan = self._cut(priced, places, ((0,),) * (len(places) + 1), "fill-drain", 1)
        factors = {}
        for part, taken in enumerate(seconds_of_parts(copy.deepcopy(self.modules(plan)), x)):
            ops = [op for op in plan.ops if op.stage == part]
            alone = sum(op.forward_s for op in ops), sum(op.backward_s for op in ops)
            forward, backward = (whole / own if own > 0 else 1.0 for whole, own in zip(taken, alone))
            factors |= {op.name: (forward, backward) for op in ops}
        return factors
