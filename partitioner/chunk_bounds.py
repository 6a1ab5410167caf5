"""Lower bounds on the largest device load over every placement, however many chunks a device holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow

from .chunk_costs import ChunkProblem
from .chunk_rows import TooManyRows, extend, first_row, merged, plan_rows, speed
from .downsets import topological_orders
from .reduction import Dag, Floats, contract

_UNITS = 2**30  # flows are whole numbers below 2**31
_BELOW = 1 - 1e-9  # bounds are rounded down by this
_MOST_ROWS = 20_000


def share_bound_s(problem: ChunkProblem) -> float:
    """The largest node, and the whole work over all devices at their best speeds."""
    rate = float(speed(problem).sum())
    shared = float(problem.least_s.sum()) / rate if rate > 0 else 0.0
    return max(float(problem.least_s.max(initial=0.0)), shared) * (1 - 1e-12)


def node_bound_s(problem: ChunkProblem, limit_s: float, check_time: Callable[[], None]) -> float:
    """Bound the load of whichever device holds a node, for every node, up to ``limit_s``.

    A paying device with the set S of nodes has their seconds plus those of the nets that S splits.  The cheapest S
    around a node is a minimum cut (the node is the source, each node of S costs its arc to the sink, and a net is an
    arc that S cuts unless it has all or nothing of the net), and one device must hold the node.  This sees dear
    transfers around a small node.  One flow per node and sort of device, in whole numbers rounded down; the best is
    computed again in floating point.

    Raises:
        Whatever ``check_time`` raises; the bound is then not known.
    """
    sorts = sorted(set(problem.twins))
    best, place = 0.0, None
    reached = problem.least_s + problem.dag.incidence @ problem.dag.net_s
    for v in np.argsort(-reached, kind="stable").tolist():
        if reached[v] <= best:
            break
        check_time()
        least = min(_held_s(problem, v, d, limit_s, exact=False) for d in sorts)
        if least > best:
            best, place = least, v
        if best >= limit_s:
            break
    if place is None:
        return best
    least = min(_held_s(problem, place, d, limit_s, exact=True) for d in sorts)
    return min(least, limit_s) * (1 - 1e-12)


def _held_s(problem: ChunkProblem, v: int, d: int, limit_s: float, *, exact: bool) -> float:
    """The least load of device ``d`` if it holds node ``v``."""
    own = float(problem.seconds[v, d])
    if not problem.devices[d].pays_transfers or own >= limit_s:
        return own
    arcs = _arcs(problem.dag, np.minimum(problem.seconds[:, d], limit_s), limit_s)
    if exact:
        graph = nx.DiGraph()
        graph.add_weighted_edges_from(arcs, weight="capacity")
        return float(nx.maximum_flow_value(graph, v, -1)) if v in graph and -1 in graph else 0.0
    n = len(problem.dag) + 2 * len(problem.dag.nets) + 1
    degree = 1 + sum(v in net for net in problem.dag.nets)
    scale = _UNITS / (degree * limit_s)
    tails, heads, capacities = (np.array(part) for part in zip(*arcs))
    matrix = coo_array((np.floor(capacities * scale).astype(np.int32), (tails, heads % n)), shape=(n, n)).tocsr()
    return float(maximum_flow(matrix, v, n - 1).flow_value) / scale


def _arcs(dag: Dag, seconds: Floats, limit_s: float) -> list[tuple[int, int, float]]:
    """Arcs of the network; -1 is the sink, and no capacity needs to be more than the limit."""
    n = len(dag)
    arcs = [(u, -1, float(cost)) for u, cost in enumerate(seconds) if cost > 0]
    for t, (net, cost) in enumerate(zip(dag.nets, dag.net_s.tolist())):
        enter, leave = n + 2 * t, n + 2 * t + 1
        arcs.append((enter, leave, min(cost, limit_s)))
        arcs += [(u, enter, limit_s) for u in net] + [(leave, u, limit_s) for u in net]
    return arcs


def packing_bound_s(problem: ChunkProblem, limit_s: float, most_rows: int, check_time: Callable[[], None]) -> float:
    """Bound the largest load by placing node after node, breadth first, with alike partial placements merged.

    Merging takes the least of each device's loads, so that the bound is true for any ``most_rows``, and exact for any
    placement where nothing but equal loads had to be merged.  Nodes that any placement below ``limit_s`` keeps on one
    device are merged first.  O(nodes x rows x devices^2).

    Returns:
        A bound of at most ``limit_s``.

    Raises:
        TooManyRows: too many nets are open at once for ``most_rows``, or at all.
        Whatever ``check_time`` raises; the bound is then not known.
    """
    small = _merge_inseparable(problem, limit_s)
    if not np.isfinite(small.least_s).all():
        return limit_s  # nodes that would share a device have none in common
    order = min(topological_orders(small.dag), key=lambda order: _open_nets(small.dag, order))
    plan = plan_rows(small, order)
    if plan is None:
        raise TooManyRows
    rows, grid_s = first_row(small, keep_choices=False), limit_s * 1e-9
    for step in range(len(order)):
        check_time()
        rows = extend(small, plan, step, rows, limit_s)
        if not len(rows.loads):
            return limit_s
        rows, grid_s = merged(small, rows, most_rows, grid_s, limit_s)
    return min(limit_s, float(rows.loads.max(axis=1).min()) * _BELOW)


def _open_nets(dag: Dag, order: list[int]) -> int:
    """Count, over the steps of an order, the nets with nodes on both sides."""
    at = {v: i for i, v in enumerate(order)}
    return sum(max(at[v] for v in net) - min(at[v] for v in net) for net in dag.nets)


def _merge_inseparable(problem: ChunkProblem, limit_s: float) -> ChunkProblem:
    """Contract the nets that are too dear to be cut: a device that pays one has a node of it as well.

    What shares a device need not share a chunk, so the result has no edges and serves for bounds alone.
    """
    dag = replace(problem.dag, edges=(), members=tuple((v,) for v in range(len(problem.dag))))
    seconds, held = problem.seconds, problem.bytes
    while int((~problem.pays).sum()) <= 1:
        least = seconds.min(axis=1)
        dear = [net for net, cost in zip(dag.nets, dag.net_s) if cost + least[list(net)].min() >= limit_s]
        if not dear:
            break
        dag = contract(dag, [(net[0], v) for net in dear for v in net[1:]])
        groups: list[Any] = [list(members) for members in dag.members]
        seconds = np.array([problem.seconds[group].sum(axis=0) for group in groups])
        held = np.array([problem.bytes[group].sum(axis=0) for group in groups])
    return replace(problem, dag=dag, seconds=seconds, bytes=held)
