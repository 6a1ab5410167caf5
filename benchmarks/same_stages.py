"""The same stages for stagecut and for torch.distributed.pipelining: parts of one captured graph."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import accumulate
from typing import Any

import networkx as nx
import torch
from rival_splits import by_places, legal_places, nearest
from torch import nn

import stagecut
from stagecut.building import tensors_of
from stagecut.partitioner.analysis import analyse
from stagecut.partitioner.assemble import Decision, assemble
from stagecut.partitioner.describe import describe
from stagecut.partitioner.loss import Loss
from stagecut.partitioner.plan import Plan
from stagecut.partitioner.planner import random_ops
from stagecut.partitioner.pricing import Pricer
from stagecut.partitioner.split import split
from stagecut.runtime.stage import Seed, build_module, input_names


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


def by_narrow_shares(graph: nx.DiGraph, seconds: Mapping[str, float], n_stages: int) -> dict[Hashable, int]:
    """Part the graph's order nearest to equal times, where one value crosses.

    Stages of torch.distributed.pipelining pass values to the next stage only, and those that split a backward in two
    fail on values that are passed on.
    """
    order = list(graph)
    sums = [0.0, *accumulate(seconds[node] for node in order)]
    index = {node: i for i, node in enumerate(order)}
    last = {node: max((index[user] for user in graph.successors(node)), default=-1) for node in order}
    places = [p for p in legal_places(graph) if sum(last[node] >= p for node in order[:p]) == 1]
    chosen = nearest([sums[p] for p in places], [sums[-1] * s / n_stages for s in range(1, n_stages)])
    return by_places(graph, [places[p] for p in chosen])


class Stages:
    """A model cut into stages whose ops take equal measured time, at microbatches of ``rows`` rows.

    The seconds of ``loss`` belong to the last stage, but do not move the cut.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, rows: int, loss: Loss | None = None) -> None:
        self.captured = stagecut.capture(model, (x,))
        self.tensors = tensors_of(self.captured, (x,), {})
        self.batch_rows, self._rows, self._loss = x.shape[0], rows, loss

    def plan(self, groups: tuple[tuple[int, ...], ...], schedule: str, n_microbatches: int) -> Plan:
        """Plan for stages on the workers that ``groups`` name."""
        cluster = describe(["cpu"] * len({worker for group in groups for worker in group}), 1).with_groups(groups)
        priced = Pricer(self.captured, self.tensors, cluster, "measured", loss=self._loss).at(self._rows, 1)
        seconds = {name: cost.forward_s + cost.backward_s for name, cost in priced.costs["cpu"].items()}
        stage_of = {str(name): s for name, s in by_narrow_shares(priced.graph, seconds, len(groups)).items()}
        decision = Decision(cluster, stage_of, (False,) * len(groups), schedule, n_microbatches)
        return assemble(self.captured, priced, decision, self.batch_rows)

    def modules(self, plan: Plan) -> list[StageModule]:
        """Return the plan's stages as modules for torch.distributed.pipelining."""
        facts = analyse(self.captured, self.tensors, self.batch_rows)
        modules = [StageModule(stage) for stage in split(self.captured, plan, random_ops(facts)).stages]
        assert all(len(module.names) == 1 == len(module.results) for module in modules)
        return modules
