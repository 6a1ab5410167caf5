"""The choice among configurations: the most promising first, and none that cannot win."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import InfeasibleError
from .assemble import n_pieces_of
from .cluster import Cluster
from .drafts import Draft, drafts_of
from .fitting import fitting
from .limits import of_shape
from .placing import owners_of
from .plan import Plan
from .step_bound import least_step_s
from .task import Task

_TOO_CLOSE = 0.03  # steps are predicted to 3 % in the median (docs/planner.md)
_WORTH_FITTING = 1.25  # configurations that are slower by more, even if memory did not matter, are not looked into
_WORTH_DRAFTING = 1.25  # on many devices; plans that are slower by more are no alternatives that one wants to see


@dataclass(frozen=True)
class Configuration:
    """Groups of devices and a microbatch count whose size has a price; no cut was made yet."""

    cluster: Cluster
    n_microbatches: int


@dataclass(frozen=True, order=True)
class _Waiting:
    """A configuration with a bound of its step, or a draft with its step; of equal ones configurations come first."""

    least_s: float
    order: tuple[object, ...]
    item: Configuration | Draft = field(compare=False)


def rank(plan: Plan) -> tuple[object, ...]:
    """Order plans by predicted step; of equal ones the simpler comes first."""
    return (plan.prediction.step_s, len(plan.devices), len(plan.stages), plan.n_microbatches, plan.schedule)


def simplest_of_close(ranked: Sequence[Plan]) -> Plan:
    """Choose the first of ranked plans, or a simpler one that is too close to it for a prediction to tell.

    Simpler is one with fewer workers, only on CPUs, where they have the same cores: more workers there need more
    memory and more care. Then fewer stages, and whole batches before microbatches that nobody needs.
    """
    best = ranked[0]
    if best.timing.n_cores is None:
        return best
    close = [plan for plan in ranked if plan.prediction.step_s <= best.prediction.step_s * (1 + _TOO_CLOSE)]
    return min(close, key=simplest_first)


def simplest_first(plan: Plan) -> tuple[object, ...]:
    """Order plans by workers, stages, and microbatches that nobody needs; then by their step."""
    return (len(plan.devices), len(plan.stages), _pieces(plan), rank(plan))


def _pieces(plan: Plan) -> int:
    """Count the microbatches of a plan without a pipeline, which only caches can make worth while."""
    return plan.n_microbatches if len(plan.stages) == 1 else 0


def fitted(task: Task, drafts: Sequence[Draft], untried: Sequence[Configuration] = ()) -> list[Plan]:
    """Make drafts fit in memory, best first; those that lose to a fitting one by far are left out.

    Configurations in ``untried`` are drafted when nothing that may be faster is left to look at: a configuration waits
    with a proven lower bound of its step, a draft with its step. So none is drafted whose bound is above
    ``_WORTH_DRAFTING`` times the best step found; and the best plan is the one that drafting all would have given.
    """
    waiting = [_Waiting(draft.plan.prediction.step_s, rank(draft.plan), draft) for draft in drafts]
    waiting += [_Waiting(_bound_s(task, item), (), item) for item in untried]
    heapq.heapify(waiting)
    found: list[Plan] = []
    best_s = float("inf")
    worth = _WORTH_FITTING if task.few_devices else 1.0
    done = 0
    while waiting:
        task.progress("fitting plans into memory", done, done + len(waiting))
        done += 1
        first = heapq.heappop(waiting)
        if isinstance(first.item, Configuration):
            if first.least_s <= best_s * _WORTH_DRAFTING:
                for draft in drafts_of(task, first.item.cluster, first.item.n_microbatches):
                    heapq.heappush(waiting, _Waiting(draft.plan.prediction.step_s, rank(draft.plan), draft))
            continue
        draft = first.item
        if first.least_s > best_s * worth and not draft.fits:
            continue  # memory only makes it slower
        try:
            plan = draft.plan if draft.fits else fitting(task, draft)
        except InfeasibleError as error:
            task.failures.append(of_shape(draft.cluster, error))
            continue
        found.append(plan)
        best_s = min(best_s, plan.prediction.step_s)
    task.progress("fitting plans into memory", done, done)
    return found


def _bound_s(task: Task, item: Configuration) -> float:
    """Bound the step of a configuration."""
    groups, priced = item.cluster.groups, task.price(item.cluster, item.n_microbatches)
    assert groups is not None
    assert priced is not None
    n_pieces = n_pieces_of(groups, item.n_microbatches, task.batch_rows)
    owners = owners_of(groups)
    return least_step_s(priced, [len(group) for group in owners], n_pieces, in_chain=len(owners) == len(groups))
