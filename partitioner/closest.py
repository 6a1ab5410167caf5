"""What would fit, where nothing does: the configuration that is closest to it, and how much memory it lacks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from ..errors import InfeasibleError
from .assemble import Decision, stage_records
from .drafts import Draft, counts_of, drafts_of
from .explain import advice_of, describe_shape
from .fitting import fitting
from .limits import limits_of, over, shares_of, with_more_memory
from .placing import Groups
from .plan import Plan
from .task import Task
from .wording import count

_MOST_HALVINGS = 10
_PATIENCE_S = 10.0  # for finding out what would fit


def closest(task: Task, ways: Sequence[Groups]) -> Plan:
    """Search for what would fit, in the configuration that is closest to it with the smallest pieces.

    Raises:
        InfeasibleError: nothing fits; it says what would.
    """
    ways = ways if task.wishes.assignment is None else []
    drafts = [draft for groups in ways if (draft := _frugal(task, groups)) is not None]
    if not drafts:
        raise task.telling_failure()
    return _with_least_more(task, min(drafts, key=lambda draft: _least_over(task, draft)))


def _least_over(task: Task, draft: Draft) -> float:
    """Return by how much the draft is over its limits, with all the recompute that it may have."""
    again = (task.wishes.recompute is not False,) * len(draft.plan.stages)
    decision = Decision(draft.cluster, draft.plan.stage_of, again, draft.schedule, draft.n_microbatches)
    stages = stage_records(task.capture, draft.priced, decision, task.batch_rows)
    return max(over(stages, limits_of(draft.cluster)))


def _frugal(task: Task, groups: Groups) -> Draft | None:
    """Cut for groups of devices, without memory limits, in the smallest pieces; those that have a price come first."""
    cluster = task.cluster.with_groups(groups)
    raised = with_more_memory(cluster, float("inf"))
    for n_microbatches in sorted(counts_of(task, cluster), key=lambda n: (not task.has_price(cluster, n), -n)):
        for draft in drafts_of(task, raised, n_microbatches):
            return replace(draft, cluster=cluster)
    return None


def _with_least_more(task: Task, draft: Draft) -> Plan:
    """Halve what every limit is raised by while a plan is still found; it may turn out to fit as they are.

    Raises:
        InfeasibleError: it does not; it advises what was found to be enough.
    """
    limits, deadline = limits_of(draft.cluster), time.monotonic() + _PATIENCE_S
    low, high = 0, math.ceil(max(over(draft.plan.stages, limits)))
    plan = draft.plan
    found = False
    for _ in range(_MOST_HALVINGS):
        extra = (low + high) // 2 if found else high
        if found and (high - low <= high // 64 or time.monotonic() > deadline):
            break
        try:
            plan = fitting(task, replace(draft, cluster=with_more_memory(draft.cluster, extra)))
            high, found = extra, True
        except InfeasibleError:
            low, high = extra, high if found else 2 * high
    if max(over(plan.stages, limits)) <= 0:
        stages = (replace(stage, memory_limit_bytes=limit) for stage, limit in zip(plan.stages, limits))
        return replace(plan, stages=tuple(stages))
    raise _unfit(task, draft, plan, [f"raise memory_bytes by {high:,}"] if found else [])


def _unfit(task: Task, draft: Draft, plan: Plan, more: Sequence[str]) -> InfeasibleError:
    """Say how far the closest plan is from fitting, and what would help."""
    limits = limits_of(draft.cluster)
    excess = over(plan.stages, limits)
    worst = max(range(len(excess)), key=excess.__getitem__)
    return InfeasibleError(
        f"no plan was found that fits in memory: the closest one, {describe_shape(plan)} under {plan.schedule} in "
        f"{count(plan.n_microbatches, 'microbatch')}, puts {plan.stages[worst].device_bytes:,} bytes on stage "
        f"{worst} on {', '.join(plan.stages[worst].devices)}, {math.ceil(excess[worst]):,} more than its "
        f"{limits[worst]:,.0f}",
        hint=", or ".join([*more, *_advice(task, draft)]) or None,
    )


def _advice(task: Task, draft: Draft) -> list[str]:
    """Ask the cut what else would fit."""
    limits, mode = shares_of(draft.cluster), task.modes()[-1]
    try:
        task.cutter.cut(draft.priced, draft.cluster, draft.schedule, draft.n_pieces, mode, limits, diagnose=True)
    except InfeasibleError as error:
        return [line for line in advice_of(error) if not line.startswith("raise")]
    return []
