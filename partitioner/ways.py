"""The groups of devices that a planner tries: uniform stages, and unequal ones with the smallest bottleneck."""

from __future__ import annotations

from ..errors import ConstraintError, InfeasibleError
from .configurations import rows_of, stage_counts, uniform_groups, wished_placement
from .explain import advice_of
from .placing import Groups
from .task import Task


def ways_of(task: Task) -> list[Groups]:
    """List the groups of devices to try; pipelines first: one device then reuses sizes that have a price.

    Raises:
        ConstraintError: the devices do not divide into the stages that were asked for.
        InfeasibleError: they do, unequally, but nothing fits.
    """
    cluster = task.cluster
    ways = uniform_groups(cluster, task.wishes)
    if task.has_fixed_rows:
        ways = [groups for groups in ways if max(map(len, groups)) == 1] or ways
    ways += [groups for groups in _unequal(task) if groups not in ways]
    if not ways:
        if task.failures:
            raise task.telling_failure()
        _check_placement(task)
        kinds = ", ".join(kind.name for kind in cluster.kinds)
        raise ConstraintError(
            f"{cluster.n_devices} devices ({kinds}) do not divide into {task.wishes.n_stages} stages of "
            "equally many devices of one kind",
            hint="give the devices of each stage: replicas=[2, 1], or nested: devices=[[0, 1], [2]]",
        )
    return sorted(ways, key=lambda groups: (len(groups) == 1, len(groups), groups))


def _check_placement(task: Task) -> None:
    """Refuse stages that the schedule cannot place."""
    n, name = task.wishes.n_stages, task.wishes.schedule
    placement = wished_placement(task.wishes)
    if placement not in (None, "chain"):
        many = "two stages" if placement == "vee" else "equally many stages"
        raise ConstraintError(
            f"{name} places {many} on every device, so stages={n} do not go on {task.cluster.n_devices} devices",
            hint=f"stages={2 * task.cluster.n_devices}, or leave out stages=",
        )


def _unequal(task: Task) -> list[Groups]:
    """List stages of unequal replica counts: for each number of stages those with the smallest bottleneck."""
    cluster, n = task.cluster, task.cluster.n_devices
    if cluster.groups is not None or n <= 2 or not task.few_devices or len(cluster.kinds) > 1:
        return []
    if task.has_fixed_rows or task.wishes.assignment is not None or wished_placement(task.wishes) in ("loop", "vee"):
        return []
    ways: list[Groups] = []
    for n_stages in stage_counts(n, task.wishes):
        if not 1 < n_stages < n or task.wishes.n_stages not in (None, n_stages):
            continue
        rows = rows_of(((0,),) * n_stages, n, task.batch_rows)
        n_pieces = -(-task.batch_rows // rows)
        try:
            priced = task.pricer.at(rows, task.threads_of(n))
        except Exception as error:
            task.failures.append(error)
            continue
        try:
            only = n % n_stages > 0 and task.wishes.n_stages is not None
            sizes = task.cutter.unequal_groups(priced, cluster, n_stages, n_pieces, task.modes(), diagnose=only)
        except InfeasibleError as error:
            task.failures.append(InfeasibleError(error.message, hint=", or ".join(advice_of(error)) or None))
            continue
        ends = [sum(sizes[: s + 1]) for s in range(len(sizes))]
        ways.append(tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends)))
    return ways
