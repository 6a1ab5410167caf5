"""Candidates in an order of compute of their own, where that was asked for or can make a difference."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConstraintError, InfeasibleError
from ..runtime.schedules import GIVEN, SEARCH
from .plan import Plan
from .ranking import rank
from .reorder import MOST_ACTIONS, given, least_s, searched
from .task import Task

_SEARCHED = 3  # pipelines; the best as predicted, of different stages or microbatches
_TIME_S = 4.0  # for each, where a search was asked for
_AUTO_TIME_S = 0.5  # and where not
_WORTH = 1.25  # pipelines that are slower than the best plan by more are not searched for unasked
_GAIN = 0.01  # what an order must gain over a published one, unasked


def in_orders_of_their_own(task: Task, candidates: Sequence[Plan], rivals: Sequence[Plan]) -> list[Plan]:
    """Add candidates with searched orders, or put those that were asked for in the place of all pipelines.

    Raises:
        InfeasibleError, PlanError, ConstraintError: the order that the user gave cannot be run.
    """
    wishes = task.wishes
    if wishes.schedule == GIVEN:
        return [given(plan, GIVEN, wishes.orders) for plan in _of_different_cuts(sorted(candidates, key=rank))]
    pipelines = sorted((plan for plan in candidates if len(plan.stages) > 1), key=rank)
    if wishes.schedule == SEARCH:
        return _searched_for(task, candidates, pipelines)
    if wishes.schedule is not None or not task.few_devices:
        return list(candidates)
    best_s = min(plan.prediction.step_s for plan in (*candidates, *rivals))
    near = [plan for plan in pipelines if plan.prediction.step_s <= _WORTH * best_s and _has_slack(plan)]
    found = _searched(task, near, _AUTO_TIME_S)
    published_s = min((plan.prediction.step_s for plan in pipelines), default=0.0)
    return [*candidates, *(plan for plan in found if plan.prediction.step_s < (1 - _GAIN) * published_s)]


def _searched_for(task: Task, candidates: Sequence[Plan], pipelines: Sequence[Plan]) -> list[Plan]:
    """Put searched orders in the place of all pipelines.

    Raises:
        ConstraintError: there are pipelines, and none whose order can be searched.
        InfeasibleError: no order fits in memory.
    """
    searchable = [plan for plan in pipelines if least_s(plan) < float("inf")]
    if pipelines and not searchable:
        raise ConstraintError(
            "schedule='search' wants as many replicas of every stage, and at most "
            f"{MOST_ACTIONS:,} computations in a step",
            hint="set replicas= to one number, or microbatches= to fewer",
        )
    found = _searched(task, searchable, _TIME_S)
    if searchable and not found:
        raise InfeasibleError("no order of compute was found that fits in memory", hint="leave out schedule=")
    return [*(plan for plan in candidates if len(plan.stages) == 1), *found]


def _searched(task: Task, pipelines: Sequence[Plan], time_s: float) -> list[Plan]:
    """Search for the best plan of each cut and microbatch count, at most ``_SEARCHED``."""
    chosen = _of_different_cuts(pipelines)[:_SEARCHED]
    found = []
    for done, plan in enumerate(chosen):
        task.progress("searching for orders of compute", done, len(chosen))
        made = searched(plan, time_s)
        found += [] if made is None else [made]
    if chosen:
        task.progress("searching for orders of compute", len(chosen), len(chosen))
    return found


def _of_different_cuts(plans: Sequence[Plan]) -> list[Plan]:
    """Leave of plans that differ in their order of compute alone the first."""
    first: dict[object, Plan] = {}
    for plan in plans:
        cut = tuple((stage.workers, stage.forward_s, stage.recompute) for stage in plan.stages)
        first.setdefault((cut, plan.n_microbatches), plan)
    return list(first.values())


def _has_slack(plan: Plan) -> bool:
    """Say whether an order could be better by more than what it must gain."""
    return least_s(plan) < (1 - _GAIN) * (plan.prediction.step_s - plan.timing.start_s)
