"""Brute force over cuts with several chunks per device: every assignment of nodes to devices, in arrays.

No code of the solver.  A group is a set of nodes that share a chunk; a placement gives each of ``n`` groups one of
``k`` devices.  All ``k ** n`` placements are scored at once, then tried from the best on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import networkx as nx
import numpy as np

from stagecut.partitioner import CutDevice

Array = np.ndarray[Any, np.dtype[Any]]
ROOM = 1e-9
_BLOCK = 1 << 17


def tied(graph: nx.DiGraph) -> nx.DiGraph:
    """The graph of the groups of nodes that must share a chunk: together-groups, and the cycles that these make."""
    arcs = nx.DiGraph(graph.edges)
    arcs.add_nodes_from(graph)
    for group in graph.graph.get("together", []):
        nx.add_cycle(arcs, group)
    return nx.condensation(arcs)


def loads_of(graph: nx.DiGraph, devices: Sequence[CutDevice], in_flight: Sequence[int]) -> Array:
    """The largest load of every placement, in the order of counting; infinite where a node or its bytes do not fit."""
    groups = tied(graph)
    n, k = len(groups), len(devices)
    if n > 0 and k**n > _BLOCK:
        blocks = [slice(at, min(at + _BLOCK, k**n)) for at in range(0, k**n, _BLOCK)]
        return np.concatenate([_loads(graph, groups, devices, in_flight, block) for block in blocks])
    return _loads(graph, groups, devices, in_flight, slice(0, k**n))


def digits(numbers: Array, n: int, k: int) -> Array:
    """The devices of the groups in placements that are given by their numbers."""  # (numbers, n)
    return (numbers[:, None] // k ** np.arange(n)[None, :]) % k


def _loads(
    graph: nx.DiGraph, groups: nx.DiGraph, devices: Sequence[CutDevice], in_flight: Sequence[int], block: slice
) -> Array:
    n, k = len(groups), len(devices)
    group_of = {node: g for g in groups for node in groups.nodes[g]["members"]}
    place = digits(np.arange(block.start, block.stop), n, k).astype(np.int8)
    has = [place == d for d in range(k)]  # per device: (rows, n)
    worst = np.zeros(len(place))
    for d, device in enumerate(devices):
        seconds, held = np.zeros(n), np.zeros(n)
        for node, record in graph.nodes.items():
            g = group_of[node]
            able = device.kind in record.get("kinds", record["compute_s"]) and record.get("pin") in (None, device.name)
            seconds[g] += record["compute_s"][device.kind] if able else math.inf
            held[g] += record.get("memory_bytes", 0.0) + in_flight[d] * record.get("stash_bytes", 0.0)
        barred = np.isinf(seconds)
        load = has[d] @ np.where(barred, 0.0, seconds)
        load[has[d][:, barred].any(axis=1)] = math.inf
        if device.memory_bytes is not None:
            load[has[d] @ held > device.memory_bytes + ROOM] = math.inf
        for net in graph.graph.get("transfers", []) if device.pays_transfers else ():
            here = has[d][:, sorted({group_of[node] for node in net["nodes"]})]
            load[here.any(axis=1) & ~here.all(axis=1)] += net["seconds"]
        worst = np.maximum(worst, load)
    return worst


def falls_into_chunks(before: Sequence[int], place: Sequence[int], n_devices: int, max_chunks: int) -> bool:
    """Tell whether some order of the groups has at most ``max_chunks`` runs of each device.

    ``before`` has the predecessors of each group as a bit mask.  A run takes all groups of its device that it can: an
    order that puts one off needs no fewer runs.  So a state is the set of groups done, and the next run's device.
    """
    on = [sum(1 << v for v, d in enumerate(place) if d == e) for e in range(n_devices)]
    full = (1 << len(place)) - 1
    start = (0, -1, (0,) * n_devices)
    stack, seen = [start], {start}
    while stack:
        done, last, runs = stack.pop()
        if done == full:
            return True
        for d in range(n_devices):
            if d == last or runs[d] == max_chunks:
                continue
            grown = _run(before, done, on[d])
            state = (grown, d, (*runs[:d], runs[d] + 1, *runs[d + 1 :]))
            if grown != done and state not in seen:
                seen.add(state)
                stack.append(state)
    return False


def _run(before: Sequence[int], done: int, own: int) -> int:
    """Add the groups of one device whose predecessors are done, until none is left."""
    waiting = own & ~done
    grew = True
    while grew:
        grew = False
        for v in _bits(waiting):
            if before[v] & ~done == 0:
                done |= 1 << v
                waiting ^= 1 << v
                grew = True
    return done


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def brute_force(graph: nx.DiGraph, devices: Sequence[CutDevice], in_flight: Sequence[int], max_chunks: int) -> float:
    """The least largest load of all cuts with so many chunks per device; infinite if there is none."""
    groups = tied(graph)
    before = [sum(1 << u for u in groups.predecessors(v)) for v in range(len(groups))]
    loads = loads_of(graph, devices, in_flight)
    order = np.argsort(loads, kind="stable")
    order = order[: int(np.isfinite(loads).sum())]
    for at in range(0, len(order), 4096):
        part = order[at : at + 4096]
        for number, place in zip(part.tolist(), digits(part, len(groups), len(devices)).tolist(), strict=True):
            if falls_into_chunks(before, place, len(devices), max_chunks):
                return float(loads[number])
    return math.inf
