"""Planning again: measured stages correct the costs of their ops, and the plan changes if that pays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import StagecutError
from ..runtime.program import Timeline
from ..runtime.schedules.tokens import actions_of
from .assemble import Decision, assemble
from .captured import Capture
from .cluster import Cluster
from .configurations import Wishes, rows_of
from .loss import Loss
from .plan import Plan
from .planner import make_plan
from .pricing import Corrections, Pricer, Progress, silent

StageSeconds = Mapping[int, tuple[float, float]]  # per stage: forward and backward of one microbatch


def stage_seconds(timeline: Timeline, action_s: float, split: float = 1.0) -> StageSeconds:
    """Return the median seconds of each stage's forwards and backwards, the runtime's own work taken off.

    Of backwards in two parts the sum is taken, as it would be in one: ``split`` is how many times as long parts take.
    """
    spans: dict[tuple[int, str], list[float]] = {}
    for span in timeline.spans:
        if span.op in ("F", "B", "I", "W"):
            spans.setdefault((span.stage, span.op), []).append(span.end_s - span.start_s)
    took = {key: max(0.0, statistics.median(times) - action_s) for key, times in spans.items()}
    apart = {s: (took[s, "I"] + took.get((s, "W"), 0.0)) / split for s, op in took if op == "I"}
    return {s: (took[s, "F"], took.get((s, "B"), apart.get(s, 0.0))) for s, op in took if op == "F"}


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
    pricer = Pricer(capture, tensors, own, wishes.costs, progress, loss=loss, onednn=wishes.onednn_matmul)
    priced = pricer.at(rows, current.n_threads)
    decision = Decision(
        own,
        current.stage_of,
        tuple(stage.recompute for stage in current.stages),
        current.schedule,
        current.n_microbatches,
        orders=actions_of(current.orders),
    )
    corrections = _corrections(assemble(capture, priced, decision, current.batch_rows), measured)
    best = make_plan(
        capture, tensors, cluster, wishes, threads_of=threads_of, progress=progress, corrections=corrections, loss=loss
    )
    pricer = Pricer(capture, tensors, own, wishes.costs, progress, corrections, loss, onednn=wishes.onednn_matmul)
    known = pricer.at(rows, current.n_threads)
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
    """Find the plan's workers in the cluster; of several devices with one name each is taken once."""
    free = list(enumerate(cluster.names))
    found = []
    for name in plan.devices:
        entry = next((entry for entry in free if entry[1] == name), None)
        if entry is None:
            raise StagecutError(f"the plan runs on {name}, which is not among the devices {cluster.names}")
        free.remove(entry)
        found.append(entry[0])
    return tuple(tuple(found[worker] for worker in stage.workers) for stage in plan.stages)
