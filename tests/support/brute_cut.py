"""Brute force over cuts of small graphs, with every option of ``solve`` but several chunks; no code of the solver."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import pytest
from hypothesis import event

from stagecut.errors import ConstraintError, InfeasibleError
from stagecut.partitioner import Cut, CutDevice, solve


@dataclass(frozen=True)
class Case:
    """What ``solve`` is given."""

    graph: nx.DiGraph
    devices: list[CutDevice]
    ordered: bool = False
    n_stages: int | None = None
    max_replicas: int = 1
    in_flight: Any = None
    n_microbatches: int | None = None
    recompute: Any = "never"

    def solve(self, **limits: Any) -> Cut:
        options = {name: value for name, value in vars(self).items() if name not in ("graph", "devices")}
        return solve(self.graph, self.devices, **options, **limits)

    def held(self, position: int, sizes: Sequence[int]) -> int:
        """Microbatches in flight, for stages on so many devices each."""
        if self.in_flight == "1f1b":
            assert self.n_microbatches is not None
            r, d = sizes[position], sum(sizes[position:])
            return min(math.ceil(self.n_microbatches / r), math.ceil(d / r))
        return 1 if self.in_flight is None else int(self.in_flight[position])


def total(case: Case, stage: frozenset[Any], name: str) -> float:
    own = sum(case.graph.nodes[v].get(name, 0.0) for v in stage)
    return float(own + sum(e.get(name, 0.0) for e in case.graph.graph.get("shared", []) if stage & {*e["nodes"]}))


def load_of(case: Case, stage: frozenset[Any], device: CutDevice, r: int, again: bool) -> float:
    load = 0.0
    for v in stage:
        costs = case.graph.nodes[v]["compute_s"]
        if device.kind not in case.graph.nodes[v].get("kinds", costs):
            return math.inf
        load += costs[device.kind] + (case.graph.nodes[v].get("forward_s", {}).get(device.kind, 0.0) if again else 0.0)
    if device.pays_transfers:
        nets = [({*net["nodes"]}, net["seconds"]) for net in case.graph.graph.get("transfers", [])]
        load += sum(seconds for nodes, seconds in nets if stage & nodes and nodes - stage)
    load /= r
    link = case.graph.graph.get("all_reduce")
    if link is None or r == 1:
        return load
    ring = 2 * (r - 1) / r * total(case, stage, "gradient_bytes") / link["bytes_per_s"]
    reduce_s = (ring + link["latency_s"]) / link["per"]
    return max(load, reduce_s) if link["overlapped"] else load + reduce_s


def bytes_of(case: Case, stage: frozenset[Any], in_flight: int, again: bool) -> float:
    once = total(case, stage, "memory_bytes") + max(case.graph.nodes[v].get("workspace_bytes", 0.0) for v in stage)
    if not again:
        return once + in_flight * total(case, stage, "stash_bytes")
    received = 0.0
    for net in case.graph.graph.get("transfers", []):
        if net["nodes"][0] not in stage and stage & {*net["nodes"][1:]}:
            received += net.get("bytes", 0.0)
    return once + in_flight * received + total(case, stage, "stash_bytes")


def best_load(case: Case, stage: frozenset[Any], device: CutDevice, r: int, held: int) -> float:
    """The load of a stage, infinite where it does not fit; it recomputes as the case says."""
    ways = {"never": [False], "choose": [False, True], "always": [True]}[case.recompute]
    limit = math.inf if device.memory_bytes is None else device.memory_bytes + 1e-6
    fitting = [again for again in ways if bytes_of(case, stage, held, again) <= limit]
    return min((load_of(case, stage, device, r, again) for again in fitting), default=math.inf)


def pins_of(case: Case, nodes: frozenset[Any]) -> set[str]:
    return {pin for v, pin in case.graph.nodes(data="pin") if pin is not None and v in nodes}


def sort_of(case: Case, device: CutDevice) -> tuple[Any, ...]:
    alone = device.name if device.name in pins_of(case, frozenset(case.graph)) else ""
    return device.kind, device.memory_bytes, device.pays_transfers, alone


def arrangements(case: Case, n: int) -> Iterator[tuple[tuple[CutDevice, ...], ...]]:
    """The devices of n stages: in order and all of them, or one arrangement out of those that differ in no sort."""
    sizes = range(1, case.max_replicas + 1)
    for counts in itertools.product(sizes, repeat=n):
        ends = list(itertools.accumulate(counts, initial=0))
        orders: list[tuple[CutDevice, ...]] = []
        if case.ordered:
            orders = [tuple(case.devices)] if ends[-1] == len(case.devices) else []
        elif ends[-1] <= len(case.devices):
            every = itertools.permutations(case.devices, ends[-1])
            orders = list({tuple(sort_of(case, d) for d in order): order for order in every}.values())
        for order in orders:
            stages = tuple(order[i:j] for i, j in itertools.pairwise(ends))
            if all(len({sort_of(case, device) for device in devices}) == 1 for devices in stages):
                yield stages


def tied_groups(case: Case) -> list[set[Any]]:
    """The nodes that have to share a stage."""
    graph = case.graph
    tied = nx.DiGraph(graph.edges)
    tied.add_nodes_from(graph)
    pinned = [[v for v, pin in graph.nodes(data="pin") if pin == device.name] for device in case.devices]
    for group in [*graph.graph.get("together", []), *pinned]:
        tied.add_edges_from(arc for u, v in itertools.pairwise(group) for arc in ((u, v), (v, u)))
    return list(nx.strongly_connected_components(tied))


def working_nodes(case: Case, n_stages: int) -> set[Any]:
    here = {device.kind for device in case.devices}
    busy = {
        v
        for v, costs in case.graph.nodes(data="compute_s")
        if any(costs[kind] > 0 for kind in here.intersection(case.graph.nodes[v].get("kinds", costs)))
    }
    return busy if sum(bool(group & busy) for group in tied_groups(case)) >= n_stages else set(case.graph)


def splits(case: Case, n: int) -> Iterator[list[frozenset[Any]]]:
    """Every way to cut the groups into n stages, none empty, every edge forward."""
    groups = tied_groups(case)
    number = {v: g for g, group in enumerate(groups) for v in group}
    arcs = {(number[u], number[v]) for u, v in case.graph.edges}
    for stage_of in itertools.product(range(n), repeat=len(groups)):
        if len({*stage_of}) == n and all(stage_of[g] <= stage_of[h] for g, h in arcs):
            yield [frozenset().union(*(groups[g] for g in range(len(groups)) if stage_of[g] == s)) for s in range(n)]


def brute_force(case: Case) -> float:
    """The least largest load of all cuts."""
    exact = case.ordered or case.n_stages is not None
    numbers = [case.n_stages] if case.n_stages is not None else range(1, len(case.devices) + 1)
    known: dict[Any, float] = {}

    def load(stage: frozenset[Any], devices: tuple[CutDevice, ...], held: int) -> float:
        key = stage, sort_of(case, devices[0]), len(devices), held
        if key not in known:
            fits = pins_of(case, stage) <= {device.name for device in devices}
            known[key] = best_load(case, stage, devices[0], len(devices), held) if fits else math.inf
        return known[key]

    ways = {n: list(arrangements(case, n)) for n in numbers}
    fewest = min((n for n in ways if ways[n]), default=0)
    working = working_nodes(case, fewest)
    best = math.inf
    for n in [n for n in ways if ways[n]]:
        held = [[case.held(s, [len(stage) for stage in way]) for s in range(n)] for way in ways[n]]
        for stages in splits(case, n):
            if not exact or all(stage & working for stage in stages):
                for way, counts in zip(ways[n], held, strict=True):
                    best = min(best, max(map(load, stages, way, counts)))
    return best


def check(case: Case, **limits: Any) -> Cut | None:
    """Compare with brute force, and score the cut again by the functions above."""
    best = brute_force(case)
    if best == math.inf:
        with pytest.raises((InfeasibleError, ConstraintError)):
            case.solve()
        event("infeasible")
        return None
    try:
        cut = case.solve(**limits)
    except InfeasibleError as error:
        if limits and "not proven" in str(error):
            return None
        raise
    check_score(case, cut)
    assert cut.lower_bound <= best * (1 + 1e-8)
    assert best * (1 - 1e-9) <= cut.max_load
    if not limits:
        assert cut.optimal
        assert cut.max_load == pytest.approx(best, rel=1e-8, abs=1e-12)
    event(f"{max(cut.replicas)} replicas, {'some' if any(cut.recompute) else 'none'} recompute")
    return cut


def check_score(case: Case, cut: Cut) -> None:
    by_name = {device.name: device for device in case.devices}
    stages = [frozenset(v for v in case.graph if cut.stage_of[v] == s) for s in range(len(cut.replicas))]
    ways = [tuple(by_name[name] for name in names) for names in cut.stage_devices]
    assert all(stages)
    assert all(cut.stage_of[u] <= cut.stage_of[v] for u, v in case.graph.edges)
    assert all(len({cut.stage_of[v] for v in group}) == 1 for group in tied_groups(case))
    assert cut.order == tuple(name for names in cut.stage_devices for name in names)
    assert len({*cut.order}) == len(cut.order)
    assert all(cut.device_of[v] == cut.stage_devices[cut.stage_of[v]][0] for v in case.graph)
    assert all(pin in (None, cut.device_of[v]) for v, pin in case.graph.nodes(data="pin"))
    assert cut.replicas == tuple(map(len, ways))
    assert max(cut.replicas) <= case.max_replicas
    assert case.n_stages in (None, len(stages))
    if case.ordered:
        assert cut.order == tuple(by_name)
    for s, (stage, way) in enumerate(zip(stages, ways, strict=True)):
        again, held = cut.recompute[s], case.held(s, cut.replicas)
        assert len({sort_of(case, device) for device in way}) == 1
        assert again in {"never": [False], "choose": [False, True], "always": [True]}[case.recompute]
        assert cut.loads_s[s] == pytest.approx(load_of(case, stage, way[0], len(way), again))
        assert cut.memory_bytes[s] == pytest.approx(bytes_of(case, stage, held, again))
        if way[0].memory_bytes is not None:
            assert cut.memory_bytes[s] <= way[0].memory_bytes + 1e-6
            needless = bytes_of(case, stage, held, False) <= way[0].memory_bytes
            assert not (again and needless and case.recompute == "choose")
    assert cut.max_load == max(cut.loads_s)
