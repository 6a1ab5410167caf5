"""The loads and bytes of a cut, added up from the caller's graph alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from .burden_input import read_all_reduce
from .cut_options import Options
from .slots import CutDevice


@dataclass(frozen=True)
class Stage:
    """The nodes of a stage, the devices that are its replicas, and whether it computes its forward again."""

    nodes: frozenset[Hashable]
    devices: tuple[CutDevice, ...]
    recompute: bool


def loads_s(graph: nx.DiGraph, stages: Sequence[Stage]) -> tuple[float, ...]:
    """Per stage: compute, forwards again and transfers, over the replicas, joined with their all-reduce."""
    reduction = read_all_reduce(graph)
    found = []
    for stage, paid in zip(stages, _transfers(graph, stages)):
        kind, r = stage.devices[0].kind, len(stage.devices)
        parts = [float(graph.nodes[node]["compute_s"][kind]) for node in stage.nodes]
        if stage.recompute:
            parts += [float((graph.nodes[node].get("forward_s") or {}).get(kind, 0.0)) for node in stage.nodes]
        busy = math.fsum(parts + paid) / r
        if reduction is not None:
            gradient_bytes = _sum(graph, stage, "gradient_bytes")
            reduce_s = float(reduction.seconds(gradient_bytes, r))
            busy = max(busy, reduce_s) if reduction.overlapped else busy + reduce_s
        found.append(busy)
    return tuple(found)


def memory_bytes(graph: nx.DiGraph, stages: Sequence[Stage], options: Options) -> tuple[float, ...]:
    """Per stage, the bytes on each of its devices: static, workspace, and those of the microbatches in flight."""
    found = []
    to_end = sum(len(stage.devices) for stage in stages)
    for s, stage in enumerate(stages):
        held = options.held(s, len(stage.devices), to_end)
        to_end -= len(stage.devices)
        workspace = max(float(graph.nodes[node].get("workspace_bytes", 0.0)) for node in stage.nodes)
        stash = _sum(graph, stage, "stash_bytes")
        kept = held * _inputs(graph, stage) + stash if stage.recompute else held * stash
        found.append(_sum(graph, stage, "memory_bytes") + workspace + kept)
    return tuple(found)


def _transfers(graph: nx.DiGraph, stages: Sequence[Stage]) -> list[list[float]]:
    stage_of = {node: s for s, stage in enumerate(stages) for node in stage.nodes}
    paid: list[list[float]] = [[] for _ in stages]
    for transfer in graph.graph.get("transfers", ()):
        payers = {stage_of[node] for node in transfer["nodes"]}
        for s in payers if len(payers) > 1 else ():
            if stages[s].devices[0].pays_transfers:
                paid[s].append(float(transfer["seconds"]))
    return paid


def _sum(graph: nx.DiGraph, stage: Stage, name: str) -> float:
    """The attribute of the stage's nodes, with what they share once."""
    shared: list[dict[str, Any]] = graph.graph.get("shared", [])
    own = [float(graph.nodes[node].get(name, 0.0)) for node in stage.nodes]
    return math.fsum(own + [float(e.get(name, 0.0)) for e in shared if not stage.nodes.isdisjoint(e["nodes"])])


def _inputs(graph: nx.DiGraph, stage: Stage) -> float:
    """The bytes that the stage receives per microbatch."""
    sizes = []
    for transfer in graph.graph.get("transfers", ()):
        producer, *users = transfer["nodes"] or [None]
        if producer not in stage.nodes and not stage.nodes.isdisjoint(users):
            sizes.append(float(transfer.get("bytes", 0.0)))
    return math.fsum(sizes)
