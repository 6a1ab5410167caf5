"""Say why no cut exists: by how many bytes the closest one misses, on which device, and what would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import InfeasibleError
from .cut_input import show
from .cut_search import Solution
from .dispatch import any_solution
from .reduction import Dag
from .slots import CutDevice, Slots, any_order, fixed_order

_MAX_HALVINGS = 16
_MAX_EXTRA_DEVICES = 16


@dataclass(frozen=True)
class _Miss:
    """The stage that exceeds its device's limit by most."""

    device: CutDevice
    needed_bytes: float
    excess_bytes: float


def too_many_stages(n_groups: int, n_stages: int) -> InfeasibleError:
    """The error for fewer groups of nodes than stages that must not be empty."""
    return InfeasibleError(
        f"{n_stages} stages were asked for, but the graph has {n_groups} nodes or groups of nodes that must share a "
        f"stage, so at most {n_groups} stages are not empty",
        hint=f"pass {n_groups} devices or fewer",
    )


def explain(dag: Dag, slots: Slots, proven: bool) -> InfeasibleError:
    """Build the error for a graph that no cut was found for.

    The bytes named are those of a cut that was found with larger limits: enough, though not proven to be least.
    """
    unlimited = _with_more_bytes(slots, np.inf)
    closest = any_solution(dag, unlimited) if any(d.memory_bytes is not None for d in slots.devices) else None
    if closest is None:
        return _no_order(slots, proven)
    closest = _closest(dag, slots, closest)
    miss = _miss(dag, slots, closest)
    limit = miss.device.memory_bytes
    certainty = "no cut fits in memory" if proven else "no cut that fits in memory was found (not proven: none exists)"
    message = (
        f"{certainty}: the closest one found puts {miss.needed_bytes:,.0f} bytes on {miss.device.name!r}, "
        f"{miss.excess_bytes:,.0f} more than its {limit:,.0f}"
    )
    too_large = _too_large(dag, slots)
    if too_large:
        message += f"; {too_large}"
    advice = [f"raise every limit by {miss.excess_bytes:,.0f} bytes"]
    more = None if too_large else _more_devices(dag, slots)
    if more is not None:
        advice.append(f"use {len(slots.devices) + more[0]} devices (with {more[0]} more like {more[1]!r} a cut exists)")
    return InfeasibleError(message, hint=", or ".join(advice))


def _no_order(slots: Slots, proven: bool) -> InfeasibleError:
    devices = ", ".join(f"{device.name} ({device.kind})" for device in slots.devices)
    if proven:
        return InfeasibleError(
            f"no cut into contiguous stages meets the pins and the kinds that nodes can run on; devices: {devices}",
            hint="drop a pin, allow more kinds, or give the devices in another order",
        )
    return InfeasibleError(
        f"no cut was found before time or downsets ran out (not proven: none exists); devices: {devices}",
        hint="raise time_limit_s or max_downsets",
    )


def _with_more_bytes(slots: Slots, extra: float) -> Slots:
    """Raise every limit; by infinity means no limit."""
    devices = tuple(
        d if d.memory_bytes is None else replace(d, memory_bytes=None if extra == np.inf else d.memory_bytes + extra)
        for d in slots.devices
    )
    return replace(slots, devices=devices)


def _closest(dag: Dag, slots: Slots, solution: Solution) -> Solution:
    """Halve the bytes by which every limit is raised while a cut is still found."""
    low, high = 0.0, _miss(dag, slots, solution).excess_bytes
    for _ in range(_MAX_HALVINGS):
        if high - low <= 1.0:
            break
        middle = (low + high) / 2
        found = any_solution(dag, _with_more_bytes(slots, middle))
        if found is None:
            low = middle
        else:
            solution, high = found, min(middle, _miss(dag, slots, found).excess_bytes)
    return solution


def _miss(dag: Dag, slots: Slots, solution: Solution) -> _Miss:
    node_of = {member: v for v, members in enumerate(dag.members) for member in members}
    misses = []
    for s, (stage, c) in enumerate(zip(solution.stages, solution.classes)):
        nodes = sorted({node_of[member] for member in stage})
        needed = float(dag.static_bytes[nodes].sum() + slots.in_flight[s] * dag.stash_bytes[nodes].sum())
        limit = slots.device(c).memory_bytes
        if limit is not None:
            misses.append(_Miss(slots.device(c), needed, needed - limit))
    return max(misses, key=lambda miss: miss.excess_bytes)


def _too_large(dag: Dag, slots: Slots) -> str:
    """Name the largest inseparable nodes that no device has room for, whatever the cut."""
    least = dag.static_bytes + min(slots.in_flight) * dag.stash_bytes
    v = int(least.argmax())
    limits = [np.inf if d.memory_bytes is None else d.memory_bytes for d in slots.devices]
    if least[v] <= max(limits):
        return ""
    return f"{show(dag.members[v])} alone need {least[v]:,.0f}, so more devices of this size do not help"


def _more_devices(dag: Dag, slots: Slots) -> tuple[int, str] | None:
    """Find how many more of the largest device make a cut possible, and its name."""
    if len(set(slots.in_flight)) > 1:
        return None  # a longer pipeline would hold other counts of microbatches
    largest = max(slots.devices, key=lambda d: np.inf if d.memory_bytes is None else d.memory_bytes)
    for extra in range(1, _MAX_EXTRA_DEVICES + 1):
        if slots.exact and dag.working.sum() < len(slots.devices) + extra:
            return None
        names = [f"{largest.name}, copy {i + 1}" for i in range(extra)]
        wider = _rebuild(dag, slots, [*slots.devices, *(replace(largest, name=name) for name in names)])
        if any_solution(dag, wider) is not None:
            return extra, largest.name
    return None


def _rebuild(dag: Dag, slots: Slots, devices: Sequence[CutDevice]) -> Slots:
    kinds = sorted({device.kind for device in devices})
    in_flight = (slots.in_flight[0],) * len(devices)
    if slots.exact:
        return fixed_order(devices, kinds, in_flight)
    return any_order(devices, kinds, in_flight, frozenset[int]().union(*dag.pins))
