"""Read and check the caller's cost graph: networkx attributes in, arrays out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import networkx as nx
import numpy as np

from ..errors import ConstraintError, InfeasibleError
from .burden_input import read_burdens, read_forward
from .burdens import Recompute
from .checks import number, positive
from .reduction import Dag, contract
from .slots import CutDevice


def read_devices(graph: nx.DiGraph, devices: Sequence[CutDevice] | None) -> tuple[CutDevice, ...]:
    """Take the devices given, or else those in ``graph.graph["devices"]``.

    Raises:
        ConstraintError: there are none, or two have the same name.
    """
    if devices is None:
        devices = [CutDevice(**entry) for entry in graph.graph.get("devices", ())]
    if not devices:
        raise ConstraintError("no devices to cut for", hint='pass devices=[CutDevice("cpu:0", "cpu"), ...]')
    names = [device.name for device in devices]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConstraintError(f"device names must differ, but {twice} occur more than once")
    return tuple(devices)


def read_in_flight(in_flight: Sequence[int] | None, n_devices: int) -> tuple[int, ...]:
    """Return the microbatches held per stage, 1 each by default.

    Raises:
        ConstraintError: the length is not the number of devices, or an entry is below 0.
    """
    held = (1,) * n_devices if in_flight is None else tuple(in_flight)
    if len(held) != n_devices or min(held) < 0:
        raise ConstraintError(
            f"in_flight needs one count of at least 0 per device ({n_devices}), but it is {list(held)}"
        )
    return held


def read_dag(
    graph: nx.DiGraph,
    devices: Sequence[CutDevice],
    kinds: Sequence[str],
    *,
    recompute: Recompute = "never",
    max_replicas: int = 1,
    pinned_share_stage: bool = True,
) -> Dag:
    """Build the arrays, with the nodes of every together-group and cycle contracted, and those of a pin by default.

    If every stage computes its forward again, the seconds of a node include it.

    Raises:
        ConstraintError: an attribute is missing, negative or names an unknown node or device; or nodes that are
            forced into one stage have different pins.
        InfeasibleError: no device can run a node, or all nodes that are forced into one stage.
    """
    nodes = list(graph.nodes)
    if not nodes:
        raise ConstraintError("the graph has no nodes, so there is nothing to cut")
    index = {node: v for v, node in enumerate(nodes)}
    pins = [_pin(node, graph.nodes[node], devices) for node in nodes]
    time_s, barred = _times(graph, nodes, kinds)
    nets = [_net(entry, index) for entry in graph.graph.get("transfers", ())]
    burdens = read_burdens(graph, index, kinds, recompute, max_replicas)
    again_s = read_forward(graph, kinds) * (barred == 0) if recompute == "always" else 0.0
    raw = Dag(
        members=tuple((node,) for node in nodes),
        edges=tuple((index[u], index[v]) for u, v in graph.edges if u != v),
        time_s=time_s + again_s,
        barred=barred,
        static_bytes=np.array([number(graph.nodes[node], "memory_bytes", node) for node in nodes]),
        stash_bytes=np.array([number(graph.nodes[node], "stash_bytes", node) for node in nodes]),
        working=(time_s.max(axis=1) > 0).astype(np.int64),
        pins=tuple(pins),
        nets=tuple(net for net, _ in nets),
        net_s=np.array([seconds for _, seconds in nets], dtype=np.float64),
        burdens=burdens,
    )
    pairs = _together(graph, index) + (pinned_pairs(pins) if pinned_share_stage else [])
    dag = contract(raw, pairs)
    _check_groups(dag, devices, kinds)
    return dag


def _times(graph: nx.DiGraph, nodes: Sequence[Hashable], kinds: Sequence[str]) -> tuple[Any, Any]:
    time_s = np.zeros((len(nodes), len(kinds)))
    barred = np.ones((len(nodes), len(kinds)), dtype=np.int64)
    for v, node in enumerate(nodes):
        attributes = graph.nodes[node]
        seconds = attributes.get("compute_s")
        if not isinstance(seconds, dict):
            raise ConstraintError(f"node {node!r} needs compute_s, a dict of seconds per device kind")
        for kind in attributes.get("kinds", seconds):
            if kind not in seconds:
                raise ConstraintError(f"node {node!r} may run on kind {kind!r}, but compute_s has only {list(seconds)}")
            if kind in kinds:
                time_s[v, kinds.index(kind)] = positive(seconds[kind], f"compute_s[{kind!r}] of node {node!r}")
                barred[v, kinds.index(kind)] = 0
    return time_s, barred


def _pin(node: Hashable, attributes: dict[str, Any], devices: Sequence[CutDevice]) -> frozenset[int]:
    name = attributes.get("pin")
    if name is None:
        return frozenset()
    names = [device.name for device in devices]
    if name not in names:
        raise ConstraintError(f"node {node!r} is pinned to {name!r}, but the devices are {names}")
    return frozenset([names.index(name)])


def _net(entry: dict[str, Any], index: dict[Hashable, int]) -> tuple[tuple[int, ...], float]:
    unknown = [node for node in entry["nodes"] if node not in index]
    if unknown:
        raise ConstraintError(f"the transfer {entry['nodes']} names unknown nodes: {unknown}")
    nodes = tuple(index[node] for node in entry["nodes"])
    return nodes, positive(entry["seconds"], f"seconds of the transfer {entry['nodes']}")


def _together(graph: nx.DiGraph, index: dict[Hashable, int]) -> list[tuple[int, int]]:
    pairs = []
    for group in graph.graph.get("together", ()):
        unknown = [node for node in group if node not in index]
        if unknown:
            raise ConstraintError(f"the together-group {list(group)} names unknown nodes: {unknown}")
        pairs += [(index[group[0]], index[node]) for node in group[1:]]
    return pairs


def pinned_pairs(pins: Sequence[frozenset[int]]) -> list[tuple[int, int]]:
    """Pair the nodes of each device's pins, for where a device holds one stage."""
    first: dict[frozenset[int], int] = {}
    return [(first.setdefault(pin, v), v) for v, pin in enumerate(pins) if pin]


def _check_groups(dag: Dag, devices: Sequence[CutDevice], kinds: Sequence[str]) -> None:
    for members, pins, barred in zip(dag.members, dag.pins, dag.barred):
        forced = f"nodes {show(members)}" + (" must share a stage, but" if len(members) > 1 else "")
        if len(pins) > 1:
            names = [devices[d].name for d in sorted(pins)]
            raise ConstraintError(
                f"{forced} are pinned to different devices: {names}",
                hint="pin them to one device, or drop the together-group or the cycle that ties them",
            )
        able = [kind for kind, count in zip(kinds, barred.tolist()) if count == 0]
        if not able:
            raise InfeasibleError(f"{forced} have no device kind in common out of {list(kinds)}")
        for d in pins:
            if devices[d].kind not in able:
                raise ConstraintError(
                    f"{forced} are pinned to {devices[d].name!r}, of kind {devices[d].kind!r}, but run on {able} only"
                )


def check_pin_order(dag: Dag, devices: Sequence[CutDevice]) -> None:
    """Check that no pinned node comes after a node that is pinned to a later device.

    Raises:
        ConstraintError: one does.
    """
    pinned = [(v, max(pins)) for v, pins in enumerate(dag.pins) if pins]
    for u, d in pinned:
        for v, e in pinned:
            if e < d and dag.after[u] >> v & 1:
                raise ConstraintError(
                    f"nodes {show(dag.members[v])} are pinned to {devices[e].name!r} and come after nodes "
                    f"{show(dag.members[u])}, pinned to {devices[d].name!r}, a later device",
                    hint="swap the pins or the devices, or pass ordered=False",
                )


def too_many_stages(n_groups: int, n_stages: int) -> InfeasibleError:
    """The error for fewer groups of nodes than stages that must not be empty."""
    return InfeasibleError(
        f"{n_stages} stages were asked for, but the graph has {n_groups} nodes or groups of nodes that must share a "
        f"stage, so at most {n_groups} stages are not empty",
        hint=f"ask for {n_groups} stages or fewer: pass fewer devices, or a smaller n_stages",
    )


def show(members: Sequence[Hashable], most: int = 6) -> str:
    """List nodes for a message, cut short after ``most``.

    >>> show(range(9), 3)
    '[0, 1, 2, ... 6 more]'
    """
    names = [repr(node) for node in members[:most]]
    if len(members) > most:
        names.append(f"... {len(members) - most} more")
    return f"[{', '.join(names)}]"
