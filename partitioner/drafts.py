"""Drafts: configurations that are cut without regard to memory, which bounds what they can reach."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConstraintError, InfeasibleError
from ..runtime.schedules import ANY_REPLICAS, TRAINING_SCHEDULES, least_microbatches
from ..runtime.schedules.families import FAMILIES
from .assemble import Decision, assemble, n_pieces_of
from .cluster import Cluster
from .configurations import FEW_DEVICES, microbatch_counts, wished_placement
from .cut_result import Cut
from .cutting import Recompute
from .limits import check_state, limits_of, of_shape, over
from .placing import owners_of, placement_of
from .plan import Plan
from .pricing import Priced
from .task import Task
from .wording import count


@dataclass(frozen=True)
class Draft:
    """A configuration that was cut without regard to memory: what its plan would be, and all that fitting it needs."""

    plan: Plan
    priced: Priced
    cluster: Cluster
    schedule: str
    n_microbatches: int
    n_pieces: int
    cut: Cut | None

    @property
    def uncounted_bytes(self) -> list[float]:
        """Return, per stage, what it holds that the cut does not count."""
        cut = self.cut
        if cut is None:
            return [0.0] * len(self.plan.stages)
        return [max(0.0, own.memory_bytes - counted) for own, counted in zip(self.plan.stages, cut.memory_bytes)]

    @property
    def fits(self) -> bool:
        """Say whether the plan fits as it is."""
        return max(over(self.plan.stages, limits_of(self.cluster))) <= 0


def drafts_of(task: Task, cluster: Cluster, n_microbatches: int) -> list[Draft]:
    """Cut for groups of devices and a microbatch count without memory limits, for each schedule."""
    assert cluster.groups is not None
    priced = task.price(cluster, n_microbatches) if has_room(task, cluster) else None
    if priced is None:
        return []
    n_pieces = n_pieces_of(cluster.groups, n_microbatches, task.batch_rows)
    mode: Recompute = "always" if task.wishes.recompute else "never"
    try:
        schedules = _schedules(task, cluster, n_pieces)
    except ConstraintError as error:
        task.failures.append(error)
        return []
    drafts = []
    for schedule in schedules:
        try:
            stages = task.stages(priced, cluster, schedule, n_pieces, mode, [float("inf")] * cluster.n_stages)
        except InfeasibleError as error:
            task.failures.append(of_shape(cluster, error))
            continue
        decision = Decision(cluster, stages.stage_of, stages.recompute, schedule, n_microbatches, stages.cut)
        plan = assemble(task.capture, priced, decision, task.batch_rows)
        drafts.append(Draft(plan, priced, cluster, schedule, n_microbatches, n_pieces, stages.cut))
    return drafts


def has_room(task: Task, cluster: Cluster) -> bool:
    """Say whether the stages can hold the model's state at all, which needs no price; note a failure if not."""
    try:
        check_state(task.state_bytes, cluster)
    except InfeasibleError as error:
        task.failures.append(of_shape(cluster, error))
        return False
    return True


def counts_of(task: Task, cluster: Cluster) -> list[int]:
    """List the microbatch counts to try with groups of devices."""
    assert cluster.groups is not None
    return microbatch_counts(task.wishes, cluster.groups, task.batch_rows, task.has_fixed_rows)


def _schedules(task: Task, cluster: Cluster, n_pieces: int) -> tuple[str, ...]:
    """List the schedules that are worth a look for groups of devices, and allow so few microbatches.

    Raises:
        ConstraintError: the schedule that the user fixed does not.
    """
    assert cluster.groups is not None
    owners, placement = owners_of(cluster.groups), placement_of(cluster.groups)
    wished = task.wishes.family
    if wished is not None:
        if cluster.n_stages == 1 and wished_placement(task.wishes) != "chain":
            return ("1f1b",)
        _check_enough(wished, len(owners), n_pieces // len(owners[0]), len(owners[0]))
        return (wished,)
    # The others hold more for nearly the same step: with one stage, or with many, they are not worth the search.
    if not 1 < len(owners) <= FEW_DEVICES:
        return ("1f1b",)
    if placement == "other":
        return ("fill-drain",)
    if len({len(group) for group in owners}) > 1:
        return ANY_REPLICAS
    return tuple(
        name
        for name in TRAINING_SCHEDULES
        if FAMILIES[name].placement == placement
        and least_microbatches(name, len(owners)) <= max(1, n_pieces // len(owners[0]))
    )


def _check_enough(name: str, n_workers: int, n_pieces: int, n_replicas: int) -> None:
    least = least_microbatches(name, n_workers)
    if n_pieces < least > 1:
        raise ConstraintError(
            f"{name} on {n_workers} devices needs at least {count(least, 'microbatch')}"
            f"{' for each replica' if n_replicas > 1 else ''}, got {n_pieces}",
            hint=f"microbatches={least}, with a batch of at least {least * n_replicas} rows",
        )
