"""From the caller's graph, devices and options to the arrays that the search works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import networkx as nx

from .burdens import Burdens
from .cut_input import check_pin_order, read_dag, too_many_stages
from .cut_options import Options
from .filling import Grouping, any_order, fixed_order
from .reduction import Dag, merge_idle
from .slots import CutDevice, Slots


@dataclass(frozen=True)
class Problem:
    """The caller's graph and wishes, with the arrays that say the same."""

    graph: nx.DiGraph
    devices: tuple[CutDevice, ...]
    options: Options
    dag: Dag
    slots: Slots


def prepare(graph: nx.DiGraph, devices: Sequence[CutDevice], options: Options) -> Problem:
    """Read the costs, forget the limits that cannot bind, list the ways to fill the devices, and merge idle nodes.

    Raises:
        InfeasibleError: there are fewer groups of nodes than stages, or one that no device can run.
        ConstraintError: the constraints contradict each other or name what is not there.
    """
    kinds = sorted({device.kind for device in devices})
    dag = read_dag(graph, devices, kinds, recompute=options.recompute, max_replicas=options.max_replicas)
    used = _drop_slack_limits(dag, devices, options.most_in_flight(len(devices)))
    limited = any(device.memory_bytes is not None for device in used)
    if not limited and dag.burdens is not None:
        dag = replace(dag, burdens=dag.burdens.without_memory())
    same = [(device.kind, device.memory_bytes, device.pays_transfers) for device in devices]
    sorts = tuple(same.index(sort) for sort in same)
    grouping = Grouping(options.max_replicas, options.n_stages, frozenset[int]().union(*dag.pins), sorts)
    if options.ordered:
        check_pin_order(dag, used)
    slots = (fixed_order if options.ordered else any_order)(used, kinds, options.in_flight, grouping)
    if slots.exact:
        dag = _fill_stages(dag, int(slots.fewest_stages(slots.finals, onward=False)[list(slots.starts)].min()))
    if slots.exact or not (limited and options.depends_on_position):
        # Else an idle node alone in a stage could put the others where fewer microbatches are in flight.
        dag = merge_idle(dag, memory_limited=limited)
    return Problem(graph, tuple(devices), options, dag, slots)


def _drop_slack_limits(dag: Dag, devices: Sequence[CutDevice], in_flight: int) -> tuple[CutDevice, ...]:
    """Forget the limits that the whole graph fits into: they cannot bind, and idle nodes with bytes can then merge."""
    most = _most_bytes(dag, dag.burdens, in_flight)
    return tuple(
        device if device.memory_bytes is None or device.memory_bytes < most else replace(device, memory_bytes=None)
        for device in devices
    )


def _most_bytes(dag: Dag, burdens: Burdens | None, in_flight: int) -> float:
    """What no stage needs more bytes than, if none recomputes without having to."""
    static, stash = math.fsum(dag.static_bytes), math.fsum(dag.stash_bytes)
    if burdens is None:
        return static + in_flight * stash
    static += float(burdens.group_bytes[:, 0].sum() + burdens.workspace_bytes.max(initial=0.0))
    stash += float(burdens.group_bytes[:, 1].sum())
    if burdens.recompute == "always":
        return static + stash + in_flight * float(burdens.input_bytes.sum())
    return static + in_flight * stash


def _fill_stages(dag: Dag, n_stages: int) -> Dag:
    if len(dag) < n_stages:
        raise too_many_stages(len(dag), n_stages)
    if dag.working.sum() < n_stages:
        return replace(dag, working=dag.working * 0 + 1)
    return dag
