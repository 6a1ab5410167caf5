"""The cut: split a DAG into pipeline stages, one or several per device, so that the busiest device has least to do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import networkx as nx

from ..errors import InfeasibleError
from .burdens import Recompute
from .chunked_cut import check_chunks, solve_chunks
from .cut_input import read_devices
from .cut_options import read_options
from .cut_problem import Problem, prepare
from .cut_result import Cut
from .cut_score import Stage, loads_s, memory_bytes
from .cut_search import Outcome, Solution
from .dispatch import search
from .misfit import explain
from .slots import CutDevice

__all__ = ["Cut", "CutDevice", "solve"]


def solve(
    graph: nx.DiGraph,
    devices: Sequence[CutDevice] | None = None,
    *,
    ordered: bool = False,
    n_stages: int | None = None,
    max_replicas: int = 1,
    in_flight: Sequence[int] | Literal["1f1b"] | None = None,
    n_microbatches: int | None = None,
    recompute: Recompute = "never",
    max_chunks: int = 1,
    time_limit_s: float = 20.0,
    max_downsets: int = 200_000,
    diagnose: bool = True,
    at_least_s: float = 0.0,
) -> Cut:
    """Cut a DAG into contiguous stages, minimising the largest load of a device.

    A stage is the difference of two downsets of the graph, so that the stages can be ordered with every edge going
    forward.  On r devices of one kind its load is

        (compute_s + forward_s if it recomputes + transfers) / r, with the all-reduce of its gradients added,

    where ``compute_s`` and ``forward_s`` are summed over its nodes for the kind, and each transfer of which it holds
    some but not all nodes counts once; and each of the r devices needs, within its limit,

        memory_bytes + largest workspace_bytes + microbatches in flight x stash_bytes, or, if it recomputes,
        memory_bytes + largest workspace_bytes + microbatches in flight x bytes received + stash_bytes,

    where it receives the ``bytes`` of each transfer whose first node (the producer) is elsewhere and of which another
    is here.

    Args:
        graph: nodes have ``compute_s`` (seconds per device kind), and may have ``memory_bytes`` (static),
            ``stash_bytes`` (saved for the backward pass, per microbatch in flight), ``workspace_bytes``,
            ``gradient_bytes``, ``forward_s`` (seconds per device kind, part of ``compute_s``), ``kinds`` (where the
            node can run; default: the keys of ``compute_s``) and ``pin`` (a device name).  ``graph.graph`` may have
            ``devices`` (dicts with the fields of CutDevice), ``transfers`` (dicts with ``nodes``, ``seconds`` and
            perhaps ``bytes``), ``together`` (lists of nodes that must share a stage; a cycle does as well),
            ``shared`` (dicts with ``nodes`` and ``memory_bytes``, ``stash_bytes`` or ``gradient_bytes`` that each
            stage with one of the nodes has once more) and ``all_reduce`` (a dict with the fields of AllReduce;
            without it, replicas add up their gradients at no cost).
        devices: where to run; default: ``graph.graph["devices"]``.
        ordered: True if stages run on the devices in the order given, one each (or the next few, with
            ``max_replicas``), and no device stays unused.  Every stage then has a node that takes time on some
            device; only in a graph with fewer such nodes than stages may one have none.
            False if the order is free and devices may stay unused.
        n_stages: the number of stages, each with a node that takes time as above; default: any, or one per device if
            ``ordered`` and without replicas.
        max_replicas: how many interchangeable devices (same kind, limit and ``pays_transfers``) a stage can have.  A
            device that a node is pinned to stays alone.
        in_flight: microbatches whose stash the stage at each position holds (a count for each of ``n_stages``, or of
            the devices); default 1.  Or "1f1b": a stage on r devices with d devices from it to the end holds
            min(ceil(n_microbatches / r), ceil(d / r)).
        n_microbatches: the microbatches of a step, for "1f1b".
        recompute: whether stages compute their forward again: "never", "always", or "choose", where a stage does so
            only if it does not fit otherwise.
        max_chunks: stages (chunks, virtual stages) that a device may hold, in any arrangement; its load is that of all
            its nodes, and so are its bytes.  Above 1, nodes pinned to one device need not share a stage, those of a
            together-group still do, and the entries of ``in_flight`` belong to ``devices`` instead of positions.
        time_limit_s: when to stop, in seconds.
        max_downsets: how many downsets to list at once.
        diagnose: where nothing fits, search for how much is missing and what would fit, for the error's message.
        at_least_s: a lower bound that the caller has proven, such as the ``lower_bound`` of the same problem with wider
            limits; a cut that meets it is optimal, and ends the search.

    Returns:
        The best cut found.  Its ``optimal`` is True only if no better one exists.  The same input gives the same cut,
        unless the search with ``max_chunks`` above 1 is stopped or hastened by the time limit.

    Raises:
        InfeasibleError: no cut meets the limits.
        ConstraintError: the constraints contradict each other or name what is not there, or ``ordered`` is asked for
            with ``max_chunks`` above 1.

    The method follows Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS
    2020), with downsets listed only where a stage below the best known load can end; replicas and microbatches in
    flight are those of Narayanan et al., "PipeDream" (SOSP 2019), proven here on the DAG.  The time is O(pairs of
    nested downsets listed x ways to fill the devices), which is exponential in the width of the graph in the worst
    case.  A graph of many nodes takes near linear time where nodes that are comparable with all others come often
    (``large_search``).  Several chunks per device: see :mod:`.chunks`.

    >>> graph = nx.DiGraph(transfers=[{"nodes": ["a", "b"], "seconds": 2.0}])
    >>> graph.add_nodes_from("abc", compute_s={"cpu": 3.0})
    >>> graph.add_edges_from(["ab", "bc"])
    >>> cut = solve(graph, [CutDevice("cpu:0", "cpu"), CutDevice("cpu:1", "cpu")])
    >>> cut.stage_of, cut.max_load, cut.optimal
    ({'a': 0, 'b': 0, 'c': 1}, 6.0, True)
    """
    start = time.monotonic()
    check_chunks(
        max_chunks,
        ordered=ordered,
        n_stages=n_stages,
        max_replicas=max_replicas,
        recompute=recompute,
        at_least_s=at_least_s,
    )
    devices = read_devices(graph, devices)
    if max_chunks > 1:
        return solve_chunks(graph, devices, in_flight, max_chunks, start, time_limit_s)
    options = read_options(
        len(devices),
        ordered=ordered,
        n_stages=n_stages,
        max_replicas=max_replicas,
        in_flight=in_flight,
        n_microbatches=n_microbatches,
        recompute=recompute,
    )
    problem = prepare(graph, devices, options)
    outcome = search(problem.dag, problem.slots, start + time_limit_s, max_downsets, at_least_s)
    if outcome.solution is None:
        if not diagnose:
            raise InfeasibleError("no cut fits" if outcome.proven else "no cut that fits was found in time")
        raise explain(problem, outcome.proven)
    return _score(problem, outcome.solution, outcome, time.monotonic() - start)


def _stages(problem: Problem, solution: Solution) -> list[Stage]:
    """Name the devices of the stages: the next ones in a fixed order, else the next unused ones that are alike."""
    unused = [list(group) for group in problem.slots.classes]
    stages = []
    for nodes, c, r, again in zip(solution.stages, solution.classes, solution.replicas, solution.recompute):
        taken = range(c, c + r) if problem.options.ordered else [unused[c].pop(0) for _ in range(r)]
        again = again or problem.options.recompute == "always"
        stages.append(Stage(frozenset(nodes), tuple(problem.devices[d] for d in taken), again))
    return stages


def _score(problem: Problem, solution: Solution, outcome: Outcome, seconds: float) -> Cut:
    """Add up loads and bytes from the caller's graph, not from the search's sums."""
    graph, stages = problem.graph, _stages(problem, solution)
    stage_of = {node: s for s, stage in enumerate(stages) for node in stage.nodes}
    loads = loads_s(graph, stages)
    lower_bound = min(outcome.lower_bound_s, max(loads))
    if outcome.proven or lower_bound >= max(loads) * (1 - 1e-9):
        lower_bound = max(loads)
    return Cut(
        device_of={node: stages[stage_of[node]].devices[0].name for node in graph.nodes},
        stage_of={node: stage_of[node] for node in graph.nodes},
        order=tuple(device.name for stage in stages for device in stage.devices),
        stage_devices=tuple(tuple(device.name for device in stage.devices) for stage in stages),
        replicas=tuple(len(stage.devices) for stage in stages),
        recompute=tuple(stage.recompute for stage in stages),
        loads_s=loads,
        memory_bytes=memory_bytes(graph, stages, problem.options),
        load_of={
            name: load for stage, load in zip(stages, loads) for name in (device.name for device in stage.devices)
        },
        max_load=max(loads),
        lower_bound=lower_bound,
        optimal=lower_bound == max(loads),
        seconds=seconds,
        n_downsets=outcome.n_downsets,
    )
