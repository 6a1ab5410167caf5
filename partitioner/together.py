"""The search on a smaller graph, where nodes that are cheaper to compute than to send stay with their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .cut_search import Outcome, simple_bound_s
from .proving import TOLERANCE
from .reduction import Dag, merge_cheap
from .slots import Slots, Step

_WORTH_MERGING = 0.98  # of the nodes: a graph that hardly shrinks does not repay the search with empty stages
_MOST_STATES = 128  # skipping stages makes steps between any two states

Search = Callable[[Dag, Slots, float], Outcome]


def search_together(dag: Dag, slots: Slots, deadline: float, search: Search, at_least_s: float = 0.0) -> Outcome:
    """Search the graph after ``merge_cheap``, which loses nothing but, where every stage needs work, a stage.

    Where no stage may be without work, a cut of the smaller graph can be worse than one of the given graph only if
    the latter has a stage whose work can move to its neighbours' stages without loss; that leaves a cut of the smaller
    graph with empty stages and the same largest load, or a smaller one.  If no such cut is below the one found, that
    is the best; else the given graph is searched.  ``at_least_s`` is a lower bound for the given graph that is known
    already; a cut that meets it is the best.
    """
    if not _may_merge(slots):
        return search(dag, slots, deadline)
    small = merge_cheap(dag, memory_limited=_is_limited(slots))
    if len(small) > _WORTH_MERGING * len(dag):
        return search(dag, slots, deadline)
    found = search(small, slots, deadline)
    is_met = found.solution is not None and found.solution.max_load_s * (1 - TOLERANCE) <= at_least_s
    if not slots.exact or is_met:
        return found
    bound_s = _bound_with_empty_stages_s(small, slots, found, deadline, search)
    if found.solution is not None and bound_s >= _goal_s(found):
        return found
    return _joined(found, bound_s, search(dag, slots, deadline))


def _may_merge(slots: Slots) -> bool:
    """Tell whether every device pays for transfers, and a stage less moves no other one to where more must fit."""
    if not all(device.pays_transfers for device in slots.devices):
        return False
    return slots.exact or not _is_limited(slots) or len({step.in_flight for step in slots.steps}) == 1


def _is_limited(slots: Slots) -> bool:
    return any(device.memory_bytes is not None for device in slots.devices)


def _goal_s(found: Outcome) -> float:
    """The bound that is enough for the outcome to be what it says."""
    assert found.solution is not None
    return found.solution.max_load_s * (1 - TOLERANCE) if found.proven else found.lower_bound_s


def _bound_with_empty_stages_s(dag: Dag, slots: Slots, found: Outcome, deadline: float, search: Search) -> float:
    """Bound the largest load of the cuts with an empty stage."""
    bound_s = _bound_without_a_device_s(dag, slots)
    if (found.solution is not None and bound_s >= _goal_s(found)) or len(slots.used) > _MOST_STATES:
        return bound_s
    loose = search(dag, with_skipped_stages(slots), deadline)
    if loose.proven:
        return max(bound_s, np.inf if loose.solution is None else loose.solution.max_load_s * (1 - TOLERANCE))
    return max(bound_s, loose.lower_bound_s)


def _bound_without_a_device_s(dag: Dag, slots: Slots) -> float:
    """Bound the largest load if some class of devices has one less."""
    bounds = []
    for c, group in enumerate(slots.classes):
        classes = (*slots.classes[:c], group[1:], *slots.classes[c + 1 :])
        kept = [i for i, left in enumerate(classes) if left]
        fewer = replace(
            slots,
            classes=tuple(classes[i] for i in kept),
            kind_of=tuple(slots.kind_of[i] for i in kept),
        )
        bounds.append(simple_bound_s(dag, fewer) if kept else np.inf)
    return min(bounds)


def with_skipped_stages(slots: Slots) -> Slots:
    """Let devices stay without a stage: a step can start from any earlier state, and any state can be the end."""
    reached = {state: {state} for state in range(len(slots.used))}
    level = slots.used.sum(axis=1)
    for step in sorted(slots.steps, key=lambda step: int(level[step.source])):
        reached[step.target] |= reached[step.source]
    steps = {
        Step(source, step.target, step.c, step.in_flight, step.replicas)
        for step in slots.steps
        for source in reached[step.source]
    }
    finals = {state for final in slots.finals for state in reached[final]}
    order = sorted(steps, key=lambda step: (step.source, step.target, step.c, step.replicas, step.in_flight))
    return replace(slots, steps=tuple(order), finals=tuple(sorted(finals)), exact=False)


def _joined(found: Outcome, bound_s: float, other: Outcome) -> Outcome:
    """What two searches know: one of the cuts that ``bound_s`` does not cover, one of all cuts."""
    solutions = [outcome.solution for outcome in (found, other) if outcome.solution is not None]
    best = min(solutions, key=lambda solution: solution.max_load_s, default=None)
    known_s = found.lower_bound_s
    if found.proven:
        known_s = np.inf if found.solution is None else found.solution.max_load_s * (1 - TOLERANCE)
    lower_bound_s = max(other.lower_bound_s, min(known_s, bound_s))
    proven = other.proven or lower_bound_s >= (np.inf if best is None else best.max_load_s * (1 - TOLERANCE))
    return Outcome(best, lower_bound_s, proven, other.n_downsets)
