"""The cut: split a DAG into pipeline stages, one or several per device, so that the busiest device has least to do."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import networkx as nx

from ..errors import ConstraintError
from .chunk_costs import chunk_problem
from .chunks import contiguous_start, misses, place_chunks
from .cut_input import check_pin_order, read_dag, read_devices, read_in_flight
from .cut_search import Outcome, search
from .misfit import explain, too_many_stages
from .reduction import Dag, merge_idle
from .slots import CutDevice, any_order, fixed_order

__all__ = ["Cut", "CutDevice", "solve"]

_PUNCTUAL = 0.92  # the part of the time limit at which the search with several chunks is told to stop


@dataclass(frozen=True)
class Cut:
    """A cut into stages with its proof; a stage is called a chunk where a device may hold several.

    Args:
        device_of: the name of the device that each node runs on.
        stage_of: the position in ``order`` of the stage that holds each node.
        order: per stage the name of its device, in pipeline order: every edge of the graph goes forward or stays.  A
            name occurs up to ``max_chunks`` times.
        loads_s: per stage, compute plus the transfers that it pays.  Of the stages of one device, the first that holds
            a node of a transfer pays it for all.
        memory_bytes: per stage, static bytes plus in-flight microbatches times stash bytes.
        load_of: per device used, the sum of ``loads_s`` over its stages.
        max_load: the largest of ``load_of``.
        lower_bound: no cut that meets the constraints has a smaller largest load (proven, up to 1e-9 relative).
        optimal: whether ``lower_bound`` reaches ``max_load``.
        seconds: the time that solving took.
        n_downsets: downsets that the last exact search for one stage per device listed.
    """

    device_of: dict[Hashable, str]
    stage_of: dict[Hashable, int]
    order: tuple[str, ...]
    loads_s: tuple[float, ...]
    memory_bytes: tuple[float, ...]
    load_of: dict[str, float]
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
    max_chunks: int = 1,
    time_limit_s: float = 20.0,
    max_downsets: int = 200_000,
) -> Cut:
    """Cut a DAG into contiguous stages, at most ``max_chunks`` per device, minimising the largest load of a device.

    A stage is the difference of two downsets of the graph, so that the stages can be ordered with every edge going
    forward.  The load of a device is the sum of ``compute_s`` of its nodes for its kind plus, once for each transfer
    of which it holds some but not all nodes, that transfer's seconds.

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
            static bytes plus in-flight microbatches times stash bytes.  With ``max_chunks`` above 1 the entries
            belong to ``devices`` instead of positions, and the limit holds for all chunks of a device together.
        max_chunks: stages (chunks, virtual stages) that a device may hold, in any arrangement.  Above 1, nodes pinned
            to one device need not share a stage, and those of a together-group still do.
        time_limit_s: when to stop, in seconds.
        max_downsets: how many downsets to list at once.

    Returns:
        The best cut found.  Its ``optimal`` is True only if no better one exists.  The same input gives the same cut,
        unless the search with ``max_chunks`` above 1 is stopped or hastened by the time limit.

    Raises:
        InfeasibleError: no cut meets the limits.
        ConstraintError: the constraints contradict each other or name what is not there, or ``ordered`` is asked for
            with ``max_chunks`` above 1.

    The method follows Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS
    2020), with downsets listed only where a stage below the best known load can end.  The time is
    O(pairs of nested downsets listed), which is exponential in the width of the graph in the worst case.  Several
    chunks per device: see :mod:`.chunks`.

    >>> graph = nx.DiGraph(transfers=[{"nodes": ["a", "b"], "seconds": 2.0}])
    >>> graph.add_nodes_from("abc", compute_s={"cpu": 3.0})
    >>> graph.add_edges_from(["ab", "bc"])
    >>> cut = solve(graph, [CutDevice("cpu:0", "cpu"), CutDevice("cpu:1", "cpu")])
    >>> cut.stage_of, cut.max_load, cut.optimal
    ({'a': 0, 'b': 0, 'c': 1}, 6.0, True)
    """
    start = time.monotonic()
    _check_chunks(max_chunks, ordered)
    devices = read_devices(graph, devices)
    held = read_in_flight(in_flight, len(devices))
    if max_chunks > 1:
        return _solve_chunks(graph, devices, held, max_chunks, start, time_limit_s)
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
    unused = [list(group) for group in slots.classes]
    used = [slots.devices[unused[c].pop(0)] for c in outcome.solution.classes]
    return _score(graph, used, outcome.solution.stages, slots.in_flight, outcome, time.monotonic() - start)


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


def _check_chunks(max_chunks: int, ordered: bool) -> None:
    if max_chunks < 1:
        raise ConstraintError(f"max_chunks must be at least 1, but it is {max_chunks}")
    if ordered and max_chunks > 1:
        raise ConstraintError(
            f"ordered=True gives every device one stage, but max_chunks is {max_chunks}",
            hint="pass ordered=False, or leave max_chunks at 1",
        )


def _solve_chunks(
    graph: nx.DiGraph,
    devices: Sequence[CutDevice],
    held: Sequence[int],
    max_chunks: int,
    start: float,
    time_limit_s: float,
) -> Cut:
    kinds = sorted({device.kind for device in devices})
    dag = read_dag(graph, devices, kinds, pinned_share_stage=False)
    devices = _drop_slack_limits(dag, devices, max(held))
    dag = merge_idle(dag, memory_limited=any(device.memory_bytes is not None for device in devices))
    problem = chunk_problem(dag, devices, kinds, held, max_chunks)
    deadline = start + _PUNCTUAL * time_limit_s
    outcome = place_chunks(problem, contiguous_start(problem, kinds, held, deadline), deadline)
    if not outcome.is_allowed:
        raise misses(problem, outcome)
    place = outcome.placement
    stages: list[list[Hashable]] = [[] for _ in place.device]
    for members, position in zip(dag.members, place.position.tolist()):
        stages[position] += members
    order = place.device.tolist()
    return _score(
        graph,
        [devices[d] for d in order],
        stages,
        [held[d] for d in order],
        Outcome(None, outcome.lower_bound_s, outcome.proven, 0),
        time.monotonic() - start,
    )


def _score(
    graph: nx.DiGraph,
    used: Sequence[CutDevice],
    stages: Sequence[Sequence[Hashable]],
    in_flight: Sequence[int],
    outcome: Outcome,
    seconds: float,
) -> Cut:
    """Name the devices and add up loads and bytes from the caller's graph, not from the search's sums."""
    stage_of = {node: s for s, nodes in enumerate(stages) for node in nodes}
    loads = [
        [float(graph.nodes[node]["compute_s"][device.kind]) for node in nodes] for device, nodes in zip(used, stages)
    ]
    for transfer in graph.graph.get("transfers", ()):
        payers = {used[s].name: s for s in sorted({stage_of[node] for node in transfer["nodes"]}, reverse=True)}
        for s in payers.values() if len(payers) > 1 else ():
            if used[s].pays_transfers:
                loads[s].append(float(transfer["seconds"]))
    of_device: dict[str, list[float]] = {}
    for device, parts in zip(used, loads):
        of_device.setdefault(device.name, []).extend(parts)
    load_of = {name: math.fsum(parts) for name, parts in of_device.items()}
    max_load = max(load_of.values())
    lower_bound = min(outcome.lower_bound_s, max_load)
    if outcome.proven or lower_bound >= max_load * (1 - 1e-9):
        lower_bound = max_load
    return Cut(
        device_of={node: used[stage_of[node]].name for node in graph.nodes},
        stage_of={node: stage_of[node] for node in graph.nodes},
        order=tuple(device.name for device in used),
        loads_s=tuple(map(math.fsum, loads)),
        memory_bytes=tuple(_bytes(graph, nodes, in_flight[s]) for s, nodes in enumerate(stages)),
        load_of=load_of,
        max_load=max_load,
        lower_bound=lower_bound,
        optimal=lower_bound == max_load,
        seconds=seconds,
        n_downsets=outcome.n_downsets,
    )


def _bytes(graph: nx.DiGraph, nodes: Iterable[Hashable], in_flight: int) -> float:
    held = [graph.nodes[node] for node in nodes]
    stash = math.fsum(float(node.get("stash_bytes", 0.0)) for node in held)
    return math.fsum(float(node.get("memory_bytes", 0.0)) for node in held) + in_flight * stash
