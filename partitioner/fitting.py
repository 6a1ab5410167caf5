"""Drafts made to fit in memory: within limits first, then with recompute on the stages that need it."""

from __future__ import annotations

from dataclasses import replace

from ..errors import InfeasibleError
from .assemble import Decision, assemble, stage_records
from .cutting import Recompute
from .drafts import Draft
from .limits import limits_of, over, shares_of, stages_beside
from .plan import Plan, StageRecord
from .task import Task

_MOST_TIGHTENINGS = 6
_SLACKS = (1.1, 1.5)  # of the limits, for cuts of which the plan may hold less than the cut says


def fitting(task: Task, draft: Draft) -> Plan:
    """Cut within the limits, without recompute first; with it where nothing else fits.

    The cut counts some bytes that a plan does not hold (views of what arrived, say): larger limits are tried too.

    Raises:
        InfeasibleError: nothing was found that fits.
    """
    failures: list[InfeasibleError] = []
    for slack in (1.0, *_SLACKS) if task.few_devices else (1.0,):
        for mode in task.modes():
            try:
                return _within_limits(task, draft, mode, slack)
            except InfeasibleError as error:
                failures.append(error)
    raise failures[len(task.modes()) - 1]


def _within_limits(task: Task, draft: Draft, mode: Recompute, slack: float) -> Plan:
    """Tighten the limits of the cut by what it does not count (values held for wires) until the plan fits."""
    cluster, limits, shares = draft.cluster, limits_of(draft.cluster), shares_of(draft.cluster)
    allowed = [slack * share - extra for share, extra in zip(shares, draft.uncounted_bytes)]
    closest: tuple[StageRecord, ...] = ()
    for _ in range(_MOST_TIGHTENINGS):
        try:
            found = task.stages(draft.priced, cluster, draft.schedule, draft.n_pieces, mode, allowed)
        except InfeasibleError:
            if not closest and slack == 1.0 and allowed != shares:
                allowed = list(shares)  # another cut may hold less that is not counted
                continue
            if not closest:
                raise
            break  # nothing is left that holds as much less as the last one was over
        decision = Decision(cluster, found.stage_of, found.recompute, draft.schedule, draft.n_microbatches, found.cut)
        stages = stage_records(task.capture, draft.priced, decision, task.batch_rows)
        excess = over(stages, limits)
        if max(excess) <= 0:
            return assemble(task.capture, draft.priced, _spared(task, draft, decision), task.batch_rows)
        if not closest or max(excess) < max(over(closest, limits)):
            closest = stages
        fewer = [1.05 * max(0.0, more) / n for more, n in zip(excess, stages_beside(cluster))]
        allowed = [own - less for own, less in zip(allowed, fewer)]
    raise _too_large(draft, closest, limits)


def _too_large(draft: Draft, closest: tuple[StageRecord, ...], limits: list[float]) -> InfeasibleError:
    """Say by how much the plan that came closest does not fit."""
    excess = over(closest, limits)
    worst = max(range(len(excess)), key=excess.__getitem__)
    return InfeasibleError(
        f"under {draft.schedule} with {draft.n_microbatches} microbatches stage {worst} on "
        f"{', '.join(draft.cluster.stages[worst])} needs {closest[worst].device_bytes:,.0f} bytes, "
        f"{excess[worst]:,.0f} more than its {limits[worst]:,.0f}",
        hint=f"raise memory_bytes by {excess[worst]:,.0f}, or use more devices or smaller microbatches",
    )


def _spared(task: Task, draft: Draft, decision: Decision) -> Decision:
    """Let stages that fit without recompute do without: the search only cares about the slowest stage."""
    if task.wishes.recompute is not None or not any(decision.recompute):
        return decision
    without = replace(decision, recompute=(False,) * len(decision.recompute))
    excess = over(stage_records(task.capture, draft.priced, without, task.batch_rows), limits_of(draft.cluster))
    return replace(decision, recompute=tuple(on and more > 0 for on, more in zip(decision.recompute, excess)))
