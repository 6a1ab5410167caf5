"""The exact contiguous cut: split a DAG into pipeline stages so that the busiest device has the least to do."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import networkx as nx

from .cut_input import check_pin_order, read_dag, read_devices, read_in_flight
from .cut_search import Outcome
from .dispatch import search
from .misfit import explain, too_many_stages
from .reduction import Dag, merge_idle
from .slots import CutDevice, Slots, any_order, fixed_order

__all__ = ["Cut", "CutDevice", "solve"]


@dataclass(frozen=True)
class Cut:
    """A contiguous cut with its proof.

    Args:
        device_of: the name of the device that each node runs on.
        stage_of: the position in ``order`` of the stage that holds each node.
        order: the names of the devices used, in pipeline order: every edge of the graph goes forward or stays.
        loads_s: per stage, compute plus the transfers that it pays.
        memory_bytes: per stage, static bytes plus in-flight microbatches times stash bytes.
        max_load: the largest of ``loads_s``.
        lower_bound: no cut that meets the constraints has a smaller largest load (proven, up to 1e-9 relative).
        optimal: whether ``lower_bound`` reaches ``max_load``.
        seconds: the time that solving took.
        n_downsets: downsets that the last exact search listed.
    """

    device_of: dict[Hashable, str]
    stage_of: dict[Hashable, int]
    order: tuple[str, ...]
    loads_s: tuple[float, ...]
    memory_bytes: tuple[float, ...]
    max_load: float
    lower_bound: float
    optimal: bool
    seconds: float
    n_downsets: int


def solve(
    graph: nx.DiGraph,
    devices: Sequence[CutDevice] | None = None,
    *,
    ordered: bool = False,
    in_flight: Sequence[int] | None = None,
    time_limit_s: float = 20.0,
    max_downsets: int = 200_000,
) -> Cut:
    """Cut a DAG into contiguous stages, one per device, minimising the largest load.

    A stage is the difference of two downsets of the graph, so that the devices can be ordered with every edge going
    forward.  Its load is the sum of ``compute_s`` for the device's kind plus, once for each transfer of which it holds
    some but not all nodes, that transfer's seconds.

    Args:
        graph: nodes have ``compute_s`` (seconds per device kind), and may have ``memory_bytes`` (static),
            ``stash_bytes`` (saved for the backward pass, per microbatch in flight), ``kinds`` (where the node can run;
            default: the keys of ``compute_s``) and ``pin`` (a device name).  ``graph.graph`` may have ``devices``
            (dicts with the fields of CutDevice), ``transfers`` (dicts with ``nodes`` and ``seconds``) and ``together``
            (lists of nodes that must share a stage).  A cycle shares a stage as well.
        devices: where to run; default: ``graph.graph["devices"]``.
        ordered: True if stage ``s`` runs on ``devices[s]``.  Then every device gets a stage with at least one node
            that takes time on some device; only in a graph with fewer such nodes than devices may a stage hold none.
            False if the order is free and devices may stay unused.
        in_flight: microbatches whose stash the stage at each position holds; default 1.  A limit holds for
            static bytes plus in-flight microbatches times stash bytes.
        time_limit_s: when to stop, in seconds.
        max_downsets: how many downsets to list at once.

    Returns:
        The best cut found.  Its ``optimal`` is True only if no better one exists.

    Raises:
        InfeasibleError: no cut meets the limits.
        ConstraintError: the constraints contradict each other or name what is not there.

    The method follows Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS
    2020), with downsets listed only where a stage below the best known load can end.  The time is
    O(pairs of nested downsets listed), which is exponential in the width of the graph in the worst case.  A graph of
    many nodes is near linear where nodes that are comparable with all others come often (``large_search``).

    >>> graph = nx.DiGraph(transfers=[{"nodes": ["a", "b"], "seconds": 2.0}])
    >>> graph.add_nodes_from("abc", compute_s={"cpu": 3.0})
    >>> graph.add_edges_from(["ab", "bc"])
    >>> cut = solve(graph, [CutDevice("cpu:0", "cpu"), CutDevice("cpu:1", "cpu")])
    >>> cut.stage_of, cut.max_load, cut.optimal
    ({'a': 0, 'b': 0, 'c': 1}, 6.0, True)
    """
    start = time.monotonic()
    devices = read_devices(graph, devices)
    held = read_in_flight(in_flight, len(devices))
    kinds = sorted({device.kind for device in devices})
    dag = read_dag(graph, devices, kinds)
    devices = _drop_slack_limits(dag, devices, max(held))
    if ordered:
        check_pin_order(dag, devices)
        slots = fixed_order(devices, kinds, held)
        dag = _fill_stages(dag, len(devices))
    else:
        slots = any_order(devices, kinds, held, frozenset[int]().union(*dag.pins))
    small = merge_idle(dag, memory_limited=any(device.memory_bytes is not None for device in devices))
    outcome = search(small, slots, start + time_limit_s, max_downsets)
    if outcome.solution is None:
        raise explain(small, slots, outcome.proven)
    return _score(graph, slots, outcome, time.monotonic() - start)


def _drop_slack_limits(dag: Dag, devices: Sequence[CutDevice], in_flight: int) -> tuple[CutDevice, ...]:
    """Forget the limits that the whole graph fits into: they cannot bind, and idle nodes with bytes can then merge."""
    most = math.fsum(dag.static_bytes) + in_flight * math.fsum(dag.stash_bytes)
    return tuple(
        device if device.memory_bytes is None or device.memory_bytes < most else replace(device, memory_bytes=None)
        for device in devices
    )


def _fill_stages(dag: Dag, n_stages: int) -> Dag:
    if len(dag) < n_stages:
        raise too_many_stages(len(dag), n_stages)
    if dag.working.sum() < n_stages:
        return replace(dag, working=dag.working * 0 + 1)
    return dag


def _score(graph: nx.DiGraph, slots: Slots, outcome: Outcome, seconds: float) -> Cut:
    """Name the devices and add up loads and bytes from the caller's graph, not from the search's sums."""
    assert outcome.solution is not None
    unused = [list(group) for group in slots.classes]
    used = [slots.devices[unused[c].pop(0)] for c in outcome.solution.classes]
    stages = outcome.solution.stages
    stage_of = {node: s for s, nodes in enumerate(stages) for node in nodes}
    loads = [
        [float(graph.nodes[node]["compute_s"][device.kind]) for node in nodes] for device, nodes in zip(used, stages)
    ]
    for transfer in graph.graph.get("transfers", ()):
        payers = {stage_of[node] for node in transfer["nodes"]}
        for s in payers if len(payers) > 1 else ():
            if used[s].pays_transfers:
                loads[s].append(float(transfer["seconds"]))
    loads_s = tuple(map(math.fsum, loads))
    lower_bound = min(outcome.lower_bound_s, max(loads_s))
    if outcome.proven or lower_bound >= max(loads_s) * (1 - 1e-9):
        lower_bound = max(loads_s)
    return Cut(
        device_of={node: used[stage_of[node]].name for node in graph.nodes},
        stage_of={node: stage_of[node] for node in graph.nodes},
        order=tuple(device.name for device in used),
        loads_s=loads_s,
        memory_bytes=tuple(_bytes(graph, nodes, slots.in_flight[s]) for s, nodes in enumerate(stages)),
        max_load=max(loads_s),
        lower_bound=lower_bound,
        optimal=lower_bound == max(loads_s),
        seconds=seconds,
        n_downsets=outcome.n_downsets,
    )


def _bytes(graph: nx.DiGraph, nodes: Iterable[Hashable], in_flight: int) -> float:
    held = [graph.nodes[node] for node in nodes]
    stash = math.fsum(float(node.get("stash_bytes", 0.0)) for node in held)
    return math.fsum(float(node.get("memory_bytes", 0.0)) for node in held) + in_flight * stash
