"""Planning again: measured stages correct the costs of their ops, and the plan changes if that pays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import StagecutError
from ..runtime.program import Timeline
from .assemble import Decision, assemble
from .captured import Capture
from .cluster import Cluster
from .configurations import Wishes, rows_of
from .loss import Loss
from .plan import Plan
from .planner import make_plan
from .pricing import Corrections, Pricer, Progress, silent

StageSeconds = Mapping[int, tuple[float, float]]  # per stage: forward and backward of one microbatch


def stage_seconds(timeline: Timeline, action_s: float) -> StageSeconds:
    """Return the median seconds of each stage's forwards and backwards, the runtime's own work taken off."""
    spans: dict[tuple[int, str], list[float]] = {}
    for span in timeline.spans:
        if span.op in ("F", "B"):
            spans.setdefault((span.stage, span.op), []).append(span.end_s - span.start_s)
    medians = {key: max(0.0, statistics.median(times) - action_s) for key, times in spans.items()}
    return {s: (medians[s, "F"], medians.get((s, "B"), 0.0)) for s, op in medians if op == "F"}


def better_plan(
    capture: Capture,
    tensors: Sequence[torch.Tensor],
    cluster: Cluster,
    wishes: Wishes,
    current: Plan,
    measured: StageSeconds,
    gain: float,
    threads_of: Callable[[int], int] | None = None,
    progress: Progress = silent,
    loss: Loss | None = None,
) -> Plan | None:
    """Return the best plan under corrected costs, if it is faster than ``current`` by ``gain``; None if not.

    Every op's forward and backward are scaled by what its stage was measured to take over what its ops add up to.

    Raises:
        StagecutError: the current plan's devices are not the cluster's.
    """
    groups = _groups_of(current, cluster)
    own = cluster.with_groups(groups)
    rows = rows_of(groups, current.n_microbatches, current.batch_rows)
    priced = Pricer(capture, tensors, own, wishes.costs, progress, loss=loss).at(rows, current.n_threads)
    decision = Decision(
        own,
        current.stage_of,
        tuple(stage.recompute for stage in current.stages),
        current.schedule,
        current.n_microbatches,
    )
    corrections = _corrections(assemble(capture, priced, decision, current.batch_rows), measured)
    best = make_plan(
        capture, tensors, cluster, wishes, threads_of=threads_of, progress=progress, corrections=corrections, loss=loss
    )
    known = Pricer(capture, tensors, own, wishes.costs, progress, corrections, loss).at(rows, current.n_threads)
    now_s = assemble(capture, known, decision, current.batch_rows).prediction.step_s
    return best if best.prediction.step_s < (1 - gain) * now_s else None


def _corrections(plan: Plan, measured: StageSeconds) -> Corrections:
    factors, n_replicas = [], max(len(stage.devices) for stage in plan.stages)
    for stage in plan.stages:
        forward_s, backward_s = measured.get(stage.index, (0.0, 0.0))
        own = -(-plan.n_microbatches * n_replicas // len(stage.devices))
        more_s = plan.timing.store_s if own == 1 else plan.timing.accumulate_s
        planned_s = stage.backward_s + (more_s[stage.index] if more_s else 0.0)
        factors.append(
            (
                forward_s / stage.forward_s if forward_s and stage.forward_s else 1.0,
                backward_s / planned_s if backward_s and planned_s else 1.0,
            )
        )
    return {op.name: factors[op.stage] for op in plan.ops}


def _groups_of(plan: Plan, cluster: Cluster) -> tuple[tuple[int, ...], ...]:
    """Find the plan's devices in the cluster; of several with one name each is taken once."""
    free = list(enumerate(cluster.names))
    groups = []
    for stage in plan.stages:
        group = []
        for name in stage.devices:
            entry = next((entry for entry in free if entry[1] == name), None)
            if entry is None:
                raise StagecutError(f"the plan runs on {name}, which is not among the devices {cluster.names}")
            free.remove(entry)
            group.append(entry[0])
        groups.append(tuple(group))
    return tuple(groups)
