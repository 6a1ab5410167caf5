"""An independent scorer of cuts: the graph's own records in, loads and faults out; no code of the solver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx


@dataclass(frozen=True)
class Score:
    """Seconds and bytes per device used, and what is wrong with the cut."""

    load_of: dict[str, float]
    bytes_of: dict[str, float]
    faults: list[str]

    @property
    def max_load(self) -> float:
        return max(self.load_of.values())


def score_cut(
    graph: nx.DiGraph,
    devices: Sequence[Mapping[str, Any]],
    stage_of: Mapping[Hashable, int],
    order: Sequence[str],
    *,
    max_chunks: int = 1,
    in_flight: Sequence[int] | None = None,
) -> Score:
    """Score a cut; ``devices`` are records like ``graph.graph["devices"]``, ``in_flight`` has an entry for each."""
    by_name = {device["name"]: device for device in devices}
    held_of = dict(zip(by_name, in_flight or [1] * len(devices), strict=True))
    load_of = dict.fromkeys(order, 0.0)
    bytes_of = dict.fromkeys(order, 0.0)
    faults = [f"no stage for {node}" for node in graph if node not in stage_of]
    faults += [f"stage {s} is empty" for s in range(len(order)) if s not in set(stage_of.values())]
    for node, record in graph.nodes.items():
        name = order[stage_of[node]]
        kind = by_name[name]["kind"]
        if kind not in record.get("kinds", record["compute_s"]):
            faults.append(f"{node} cannot run on {name}")
        if record.get("pin") not in (None, name):
            faults.append(f"{node} is pinned to {record['pin']}, not {name}")
        load_of[name] += record["compute_s"].get(kind, 0.0)
        bytes_of[name] += record.get("memory_bytes", 0.0) + held_of[name] * record.get("stash_bytes", 0.0)
    for transfer in graph.graph.get("transfers", []):
        holders = {order[stage_of[node]] for node in transfer["nodes"]}
        for name in holders:
            if len(holders) > 1 and by_name[name].get("pays_transfers", True):
                load_of[name] += transfer["seconds"]
    for name, held in bytes_of.items():
        limit = by_name[name].get("memory_bytes")
        if limit is not None and held > limit * (1 + 1e-9):
            faults.append(f"{name} holds {held} bytes of {limit}")
    for u, v in graph.edges:
        if stage_of[u] > stage_of[v]:
            faults.append(f"edge {u} -> {v} goes back from stage {stage_of[u]} to {stage_of[v]}")
    for group in graph.graph.get("together", []):
        if len({stage_of[node] for node in group}) > 1:
            faults.append(f"{group} do not share a stage")
    for name, count in Counter(order).items():
        if count > max_chunks:
            faults.append(f"{name} has {count} stages")
    return Score(load_of, bytes_of, faults)
