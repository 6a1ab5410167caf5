"""Idle time by its cause."""

from __future__ import annotations

from ...runtime.instructions import Action
from .critical import awaited
from .score import Scored

CAUSES = ("warm-up", "drain", "communication", "memory", "imbalance")


def idle_by_cause(scored: Scored) -> dict[str, float]:
    """Return the share of all workers' time until the makespan that is idle, by cause; the sum is the bubble.

    *Warm-up* is before a worker's first computation, *drain* after its last. Of a gap between two, *communication* is
    the part in which the awaited packet travels; *memory* the rest if a forward was there that would have filled it,
    but did not fit; *imbalance* what is left: the packet was not sent yet.
    """
    total = scored.makespan_s * len(scored.orders)
    seconds = dict.fromkeys(CAUSES, 0.0)
    if not total:
        return seconds
    end_of = {a: end for order, ends in zip(scored.orders, scored.ends_s) for a, end in zip(order, ends)}
    for worker, order in enumerate(scored.orders):
        if not order:
            seconds["warm-up"] += scored.makespan_s
            continue
        starts, ends = scored.starts_s(worker), scored.ends_s[worker]
        seconds["warm-up"] += starts[0]
        seconds["drain"] += scored.makespan_s - ends[-1]
        for place in range(1, len(order)):
            gap = starts[place] - ends[place - 1]
            if gap <= 1e-12:
                continue
            travels = min(gap, starts[place] - _sent_s(scored, order[place], end_of))
            seconds["communication"] += travels
            cause = "memory" if _is_full(scored, worker, place, ends[place - 1], end_of) else "imbalance"
            seconds[cause] += gap - travels
    return {cause: value / total for cause, value in seconds.items()}


def _sent_s(scored: Scored, action: Action, end_of: dict[Action, float]) -> float:
    """Return when the packet that an action waits for was sent."""
    return next(end_of[needed] for needed in awaited(scored.problem, action) if needed in end_of)


def _is_full(scored: Scored, worker: int, place: int, now: float, end_of: dict[Action, float]) -> bool:
    """Say whether a later forward of the worker could run now if there were room for it."""
    problem = scored.problem
    limits = problem.costs.memory_bytes
    if limits is None:
        return False
    held = _held_bytes(scored, worker, place)
    seen: set[int] = set()
    for action in scored.orders[worker][place:]:
        if action.kind != "F" or action.stage in seen:
            continue
        seen.add(action.stage)
        needed = awaited(problem, action)
        there_s = end_of[needed[0]] + problem.link_s(action.stage - 1) if needed else 0.0
        if there_s <= now and held + problem.costs.activation_bytes[action.stage] > limits[worker] * (1 + 1e-9):
            return True
    return False


def _held_bytes(scored: Scored, worker: int, place: int) -> float:
    costs, held = scored.problem.costs, 0.0
    for action in scored.orders[worker][:place]:
        own, later = costs.activation_bytes[action.stage], costs.weight_grad_bytes[action.stage]
        held += {"F": own, "I": later - own, "W": -later, "B": -own}[action.kind]
    return held
