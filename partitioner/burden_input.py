"""Read and check the costs of the caller's graph that do not simply add up over the nodes of a stage."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import networkx as nx
import numpy as np

from ..errors import ConstraintError
from .burdens import AllReduce, Burdens, Floats, Net, Recompute
from .checks import number, positive

_GROUP_BYTES = ("memory_bytes", "stash_bytes", "gradient_bytes")


def read_burdens(
    graph: nx.DiGraph, index: dict[Hashable, int], kinds: Sequence[str], recompute: Recompute, max_replicas: int
) -> Burdens | None:
    """Build the arrays, with nothing in them that the options leave without effect; None if nothing has any.

    Raises:
        ConstraintError: an attribute is negative, not finite, or names an unknown node or field.
    """
    reduction = read_all_reduce(graph) if max_replicas > 1 else None
    forward_s = read_forward(graph, kinds)
    gradient_bytes = _column(graph, "gradient_bytes")
    shared = [_group(entry, index) for entry in graph.graph.get("shared", ())]
    inputs = [
        _input(entry, index) for entry in graph.graph.get("transfers", ()) if entry["nodes"] and recompute != "never"
    ]
    found = Burdens(
        forward_s=forward_s if recompute == "choose" else forward_s * 0,
        gradient_bytes=gradient_bytes * (reduction is not None),
        workspace_bytes=_column(graph, "workspace_bytes"),
        groups=tuple(nodes for nodes, _ in shared),
        group_bytes=np.array([sizes for _, sizes in shared], dtype=np.float64).reshape(-1, 3)
        * [1.0, 1.0, float(reduction is not None)],
        inputs=tuple(net for net, _ in inputs),
        input_bytes=np.array([size for _, size in inputs], dtype=np.float64),
        recompute=recompute,
        all_reduce=reduction,
    )
    weighs = found.workspace_bytes.any() or found.group_bytes.any() or recompute != "never"
    return found if weighs or reduction is not None else None


def read_all_reduce(graph: nx.DiGraph) -> AllReduce | None:
    """The price in ``graph.graph["all_reduce"]``; None if there is none.

    Raises:
        ConstraintError: a field is unknown, out of range, or missing.
    """
    entry = graph.graph.get("all_reduce")
    if entry is None:
        return None
    try:
        price = AllReduce(**entry)
    except TypeError as error:
        raise ConstraintError(
            f"all_reduce needs bytes_per_s and may have latency_s, overlapped and per: {error}"
        ) from None
    positive(price.latency_s, "latency_s of all_reduce")
    if not (price.bytes_per_s > 0 and price.per > 0):
        raise ConstraintError(f"bytes_per_s and per of all_reduce must be above 0, but they are {entry}")
    return price


def read_forward(graph: nx.DiGraph, kinds: Sequence[str]) -> Floats:
    """Seconds of each node's forward per kind; 0 where none are given."""
    seconds = np.zeros((len(graph), len(kinds)))
    for v, (node, given) in enumerate(graph.nodes(data="forward_s")):
        for k, kind in enumerate(kinds):
            seconds[v, k] = positive((given or {}).get(kind, 0.0), f"forward_s[{kind!r}] of node {node!r}")
    return seconds


def _column(graph: nx.DiGraph, name: str) -> Floats:
    return np.array([number(attributes, name, node) for node, attributes in graph.nodes.items()])


def _group(entry: dict[str, Any], index: dict[Hashable, int]) -> tuple[tuple[int, ...], list[float]]:
    unknown = [node for node in entry["nodes"] if node not in index]
    if unknown or not entry["nodes"]:
        raise ConstraintError(
            f"the shared bytes of {entry['nodes']} name " + (f"unknown nodes: {unknown}" if unknown else "no nodes")
        )
    nodes = tuple(sorted({index[node] for node in entry["nodes"]}))
    return nodes, [positive(entry.get(name, 0.0), f"{name} shared by {entry['nodes']}") for name in _GROUP_BYTES]


def _input(entry: dict[str, Any], index: dict[Hashable, int]) -> tuple[Net, float]:
    producer, *users = (index[node] for node in entry["nodes"])
    size = positive(entry.get("bytes", 0.0), f"bytes of the transfer {entry['nodes']}")
    return (producer, tuple(sorted({*users} - {producer}))), size
