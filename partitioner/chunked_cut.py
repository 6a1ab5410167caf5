"""The cut with several chunks per device: from the caller's graph to placements and back."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

import networkx as nx

from ..errors import ConstraintError
from .chunk_costs import chunk_problem
from .chunks import contiguous_start, misses, place_chunks
from .cut_input import read_dag, read_in_flight
from .cut_result import Cut
from .cut_search import Outcome
from .reduction import Dag, merge_idle
from .slots import CutDevice

_PUNCTUAL = 0.92  # the part of the time limit at which the search with several chunks is told to stop


def check_chunks(
    max_chunks: int, *, ordered: bool, n_stages: int | None, max_replicas: int, recompute: str, at_least_s: float
) -> None:
    """Refuse options that several chunks per device do not go with.

    Raises:
        ConstraintError: one is set, or ``max_chunks`` is below 1.
    """
    if max_chunks < 1:
        raise ConstraintError(f"max_chunks must be at least 1, but it is {max_chunks}")
    if max_chunks == 1:
        return
    if ordered:
        raise ConstraintError(
            f"ordered=True gives every device one stage, but max_chunks is {max_chunks}",
            hint="pass ordered=False, or leave max_chunks at 1",
        )
    for name, is_set in (
        ("n_stages", n_stages is not None),
        ("max_replicas", max_replicas > 1),
        ("recompute", recompute != "never"),
        ("at_least_s", at_least_s > 0),
    ):
        if is_set:
            raise ConstraintError(
                f"{name} is for one stage per device, but max_chunks is {max_chunks}", hint=f"leave {name} out"
            )


def solve_chunks(
    graph: nx.DiGraph,
    devices: Sequence[CutDevice],
    in_flight: Sequence[int] | str | None,
    max_chunks: int,
    start: float,
    time_limit_s: float,
) -> Cut:
    """Cut with up to ``max_chunks`` stages on each device (see ``solve``).

    Raises:
        InfeasibleError: no cut meets the limits.
        ConstraintError: the constraints contradict each other.
    """
    if isinstance(in_flight, str):
        raise ConstraintError(
            f"in_flight={in_flight!r} counts one stage per device, but max_chunks is {max_chunks}",
            hint="pass one count per device",
        )
    held = read_in_flight(in_flight, len(devices))
    kinds = sorted({device.kind for device in devices})
    dag = read_dag(graph, devices, kinds, pinned_share_stage=False)
    if dag.burdens is not None and any(device.memory_bytes is not None for device in devices):
        raise ConstraintError(
            "shared bytes and workspace are not counted with max_chunks above 1, and a device has a limit",
            hint="leave max_chunks at 1, or drop the graph's shared entries and workspace_bytes",
        )
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


def _drop_slack_limits(dag: Dag, devices: Sequence[CutDevice], in_flight: int) -> tuple[CutDevice, ...]:
    """Forget the limits that the whole graph fits into: they cannot bind, and idle nodes with bytes can then merge."""
    most = math.fsum(dag.static_bytes) + in_flight * math.fsum(dag.stash_bytes)
    return tuple(
        device if device.memory_bytes is None or device.memory_bytes < most else replace(device, memory_bytes=None)
        for device in devices
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
        stage_devices=tuple((device.name,) for device in used),
        replicas=(1,) * len(used),
        recompute=(False,) * len(used),
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
