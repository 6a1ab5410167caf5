"""The critical path: the computations without slack that together last as long as the step."""

from __future__ import annotations

from collections.abc import Sequence

from ...runtime.instructions import Action
from .clock import Problem

Run = tuple[int, int, int]  # worker, first place in its order, last place


def critical_runs(problem: Problem, orders: Sequence[Sequence[Action]], ends: Sequence[Sequence[float]]) -> list[Run]:
    """Return one critical path as runs of computations that follow each other on a worker without a gap, last first."""
    worker = max(range(len(ends)), key=lambda w: ends[w][-1] if ends[w] else 0.0)
    place = len(ends[worker]) - 1
    at = {action: (w, i) for w, order in enumerate(orders) for i, action in enumerate(order)}
    found = []
    while place >= 0:
        last = place
        while place > 0 and ends[worker][place - 1] >= _start_s(problem, orders, ends, worker, place) - 1e-12:
            place -= 1
        found.append((worker, place, last))
        needed = awaited(problem, orders[worker][place])
        if not needed:
            break
        worker, place = next(at[action] for action in needed if action in at)
    return found


def critical_path(
    problem: Problem, orders: Sequence[Sequence[Action]], ends: Sequence[Sequence[float]]
) -> list[Action]:
    """Return the computations of one critical path, first to last."""
    runs = critical_runs(problem, orders, ends)
    return [action for worker, first, last in reversed(runs) for action in orders[worker][first : last + 1]]


def awaited(problem: Problem, action: Action) -> tuple[Action, ...]:
    """Return what an action waits for from another stage, under the names that it may have."""
    s, m = action.stage, action.microbatch
    if action.kind == "F":
        return (Action("F", s - 1, m),) if s else ()
    if action.kind == "W" or s == problem.layout.n_stages - 1:
        return ()
    return Action("I", s + 1, m), Action("B", s + 1, m)


def _start_s(
    problem: Problem, orders: Sequence[Sequence[Action]], ends: Sequence[Sequence[float]], worker: int, place: int
) -> float:
    action = orders[worker][place]
    return ends[worker][place] - problem.costs.seconds(action.kind, action.stage)
