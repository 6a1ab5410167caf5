"""The planner: tries configurations, cuts for each, ranks by the simulator, and says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..errors import ConstraintError, InfeasibleError
from ..runtime.schedules import TRAINING_SCHEDULES
from .analysis import OpFacts
from .assemble import Decision, assemble, n_pieces_of
from .captured import Capture
from .cluster import Cluster
from .configurations import (
    FEW_DEVICES,
    Groups,
    Wishes,
    microbatch_counts,
    rows_of,
    stage_counts,
    uniform_groups,
)
from .cutting import Cutter, Recompute, Stages
from .explain import reasons
from .plan import Alternative, Plan
from .pricing import Corrections, Priced, Pricer, Progress, silent

_SOLVE_S = 20.0
_MOST_TIGHTENINGS = 6
_KEPT = 12


def make_plan(
    capture: Capture,
    tensors: Sequence[torch.Tensor],
    cluster: Cluster,
    wishes: Wishes,
    *,
    threads_of: Callable[[int], int] | None = None,
    progress: Progress = silent,
    corrections: Corrections | None = None,
) -> Plan:
    """Choose stages, replicas, microbatches, schedule and recompute for ``cluster``.

    ``tensors`` are the tensor leaves of an example call; the rows of the batched ones are the batch that the plan is
    for. ``threads_of`` gives the CPU threads of each worker for a number of workers; by default they share the cores of
    their host; ``corrections`` multiply the costs of ops. Deterministic for equal costs. A
    microbatch count of the planner's own that the model refuses (BatchNorm wants more than one row) is left out.

    Raises:
        InfeasibleError: no cut fits the devices' memory, or there are fewer ops than stages.
        ConstraintError: the wishes contradict each other.
    """
    batched = [leaf.batched for leaf in capture.inputs.leaves if leaf.graph_input is not None]
    batch_rows = next(tensor.shape[0] for tensor, cut in zip(tensors, batched) if cut)
    pricer = Pricer(capture, tensors, cluster, wishes.costs, progress, corrections)
    return _Planner(capture, pricer, cluster, wishes, batch_rows, threads_of or _share_of_cores(cluster)).run()


def _share_of_cores(cluster: Cluster) -> Callable[[int], int]:
    return lambda n_workers: max(1, (cluster.n_cores or 1) // n_workers)


class _Planner:
    def __init__(
        self,
        capture: Capture,
        pricer: Pricer,
        cluster: Cluster,
        wishes: Wishes,
        batch_rows: int,
        threads_of: Callable[[int], int],
    ) -> None:
        self.capture, self.pricer, self.cluster, self.wishes = capture, pricer, cluster, wishes
        self.batch_rows, self.threads_of = batch_rows, threads_of
        self.cutter = Cutter(_SOLVE_S)
        self.failures: list[Exception] = []
        self.best_s = float("inf")

    def run(self) -> Plan:
        candidates = self._candidates(self._ways())
        if not candidates:
            raise self._why_nothing() or self.failures[0]
        rivals = self._rivals()
        ranked = sorted(candidates, key=_rank)
        chosen = ranked[0]
        others = sorted([*ranked[1:], *rivals], key=_rank)[:_KEPT]
        alone = [plan.prediction.step_s for plan in (*candidates, *rivals) if len(plan.devices) == 1]
        one_device_s = min([*alone, chosen.prediction.one_device_s])
        chosen = replace(
            chosen,
            prediction=replace(chosen.prediction, one_device_s=one_device_s),
            alternatives=tuple(map(_alternative, others)),
        )
        return replace(chosen, reasons=reasons(chosen, ranked[1:], rivals, self.failures))

    def _ways(self) -> list[Groups]:
        """List the groups of devices to try; pipelines first: one device then reuses sizes that have a price."""
        ways = uniform_groups(self.cluster, self.wishes)
        if self.capture.inputs.rows is not None:
            ways = [groups for groups in ways if max(map(len, groups)) == 1] or ways
        ways += [groups for groups in self._unequal_ways() if groups not in ways]
        if not ways:
            raise ConstraintError(
                f"{self.cluster.n_devices} devices of {len(self.cluster.kinds)} kinds do not make "
                f"{self.wishes.n_stages} stages of equal kinds",
                hint="nest the devices to say which make a stage: devices=[[0, 1], [2]]",
            )
        return sorted(ways, key=lambda groups: (len(groups) == 1, len(groups), groups))

    def _unequal_ways(self) -> list[Groups]:
        """List stages of unequal replica counts: for each number of stages those with the smallest bottleneck."""
        cluster, n = self.cluster, self.cluster.n_devices
        if cluster.groups is not None or not 2 < n <= FEW_DEVICES or len(cluster.kinds) > 1:
            return []
        if self.capture.inputs.rows is not None or self.wishes.assignment is not None:
            return []
        ways: list[Groups] = []
        for n_stages in stage_counts(n, self.wishes):
            if not 1 < n_stages < n:
                continue
            rows = rows_of(((0,),) * n_stages, n, self.batch_rows)
            n_pieces = -(-self.batch_rows // rows)
            try:
                priced = self.pricer.at(rows, self.threads_of(n))
            except Exception as error:
                self.failures.append(error)
                continue
            sizes = self.cutter.unequal_groups(priced, cluster, n_stages, n_pieces)
            if sizes is not None:
                ends = [sum(sizes[: s + 1]) for s in range(len(sizes))]
                ways.append(tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends)))
        return ways

    def _candidates(self, ways: Sequence[Groups]) -> list[Plan]:
        found: list[Plan] = []
        for groups in ways:
            for count in microbatch_counts(self.wishes, groups, self.batch_rows, self.capture.inputs.rows is not None):
                cluster = self.cluster.with_groups(groups)
                if len(groups) == 1 and any(len(plan.stages) == 1 and plan.devices == cluster.names for plan in found):
                    rows = rows_of(groups, count, self.batch_rows)
                    if not self.pricer.is_known(rows, self.threads_of(cluster.n_devices)):
                        continue  # it fits in larger pieces: smaller ones would have to be measured for little
                found += self._of(cluster, count)
        return found

    def _of(self, cluster: Cluster, count: int) -> list[Plan]:
        """Return the plans for groups of devices and a microbatch count, one for each schedule."""
        assert cluster.groups is not None
        rows = rows_of(cluster.groups, count, self.batch_rows)
        try:
            priced = self.pricer.at(rows, self.threads_of(cluster.n_devices))
        except Exception as error:
            if self.wishes.n_microbatches is not None:
                raise
            self.failures.append(error)
            return []
        n_pieces = n_pieces_of(cluster.groups, count, self.batch_rows)
        work_s = sum(priced.work_s(device.kind.name) ** -1 for device in cluster.devices) ** -1 * n_pieces
        if work_s > self.best_s:
            return []  # even with all devices busy all the time it would take longer than what is known
        schedules = (self.wishes.schedule,) if self.wishes.schedule else TRAINING_SCHEDULES
        if len(cluster.groups) == 1 and self.wishes.schedule is None:
            schedules = ("1f1b",)  # one stage: the others only hold more
        found = []
        for schedule in schedules:
            try:
                found.append(self._fitting(priced, cluster, schedule, count, n_pieces))
            except InfeasibleError as error:
                self.failures.append(error)
        if found:
            self.best_s = min(self.best_s, *(plan.prediction.step_s for plan in found))
        return found

    def _fitting(self, priced: Priced, cluster: Cluster, schedule: str, count: int, n_pieces: int) -> Plan:
        """Cut and assemble, without recompute first; with it where nothing else fits."""
        modes: list[Recompute] = ["never", "choose"]
        if self.wishes.recompute is not None:
            modes = ["always"] if self.wishes.recompute else ["never"]
        for mode in modes:
            try:
                return self._within_limits(priced, cluster, schedule, count, n_pieces, mode)
            except InfeasibleError as error:
                failure = error
        raise failure

    def _within_limits(
        self, priced: Priced, cluster: Cluster, schedule: str, count: int, n_pieces: int, mode: Recompute
    ) -> Plan:
        """Tighten the limits of the cut by what it does not count (values held for wires) until the plan fits."""
        assert cluster.groups is not None
        limits = [min(cluster.devices[index].kind.memory_bytes for index in group) for group in cluster.groups]
        allowed = list(limits)
        for _ in range(_MOST_TIGHTENINGS):
            stages = self._stages(priced, cluster, schedule, n_pieces, mode, allowed)
            decision = Decision(cluster, stages.stage_of, stages.recompute, schedule, count, stages.cut)
            plan = assemble(self.capture, priced, decision, self.batch_rows)
            over = [stage.memory_bytes - limit for stage, limit in zip(plan.stages, limits)]
            if max(over) <= 0:
                return plan
            allowed = [limit - 1.05 * max(0.0, excess) for limit, excess in zip(allowed, over)]
        worst = max(range(len(over)), key=over.__getitem__)
        raise InfeasibleError(
            f"{len(limits)} stages under {schedule} with {count} microbatches do not fit: stage {worst} on "
            f"{', '.join(cluster.stages[worst])} needs {plan.stages[worst].memory_bytes:,.0f} bytes, "
            f"{over[worst]:,.0f} more than its {limits[worst]:,.0f}",
            hint=f"raise memory_bytes by {over[worst]:,.0f}, or use more devices or smaller microbatches",
        )

    def _stages(
        self,
        priced: Priced,
        cluster: Cluster,
        schedule: str,
        n_pieces: int,
        mode: Recompute,
        limits: Sequence[float],
    ) -> Stages:
        if self.wishes.assignment is not None:
            return Stages(dict(self.wishes.assignment), (mode == "always",) * cluster.n_stages)
        return self.cutter.cut(priced, cluster, schedule, n_pieces, mode, limits)

    def _why_nothing(self) -> InfeasibleError | None:
        """Search for what would fit: for the configuration that needs least, most stages and smallest pieces."""
        groups = max(self._ways(), key=len)
        count = microbatch_counts(self.wishes, groups, self.batch_rows, self.capture.inputs.rows is not None)[-1]
        cluster = self.cluster.with_groups(groups)
        rows = rows_of(groups, count, self.batch_rows)
        if self.wishes.assignment is not None or not self.pricer.is_known(rows, self.threads_of(cluster.n_devices)):
            return None
        priced = self.pricer.at(rows, self.threads_of(cluster.n_devices))
        modes: dict[bool | None, Recompute] = {None: "choose", True: "always", False: "never"}
        mode = modes[self.wishes.recompute]
        limits = [min(cluster.devices[index].kind.memory_bytes for index in group) for group in groups]
        n_pieces = n_pieces_of(groups, count, self.batch_rows)
        schedule = self.wishes.schedule or "1f1b"
        try:
            self.cutter.cut(priced, cluster, schedule, n_pieces, mode, limits, diagnose=True)
        except InfeasibleError as error:
            return error
        return None

    def _rivals(self) -> list[Plan]:
        """Plan for one device and for plain data parallelism where the user's wishes leave them out, to compare."""
        cluster = self.cluster
        if self.wishes.assignment is not None or len(cluster.kinds) > 1:
            return []
        wanted: list[Groups] = [((0,),)]
        if cluster.n_devices > 1 and self.capture.inputs.rows is None:
            wanted.append((tuple(range(cluster.n_devices)),))
        tried = self._ways()
        kept, self.best_s = self.best_s, float("inf")
        found = []
        for groups in wanted:
            if groups not in tried:
                found += self._of(cluster.with_groups(groups), 1)
        self.best_s = kept
        return found


def _rank(plan: Plan) -> tuple[object, ...]:
    """Order plans by predicted step; of equal ones the simpler comes first."""
    return (plan.prediction.step_s, len(plan.devices), len(plan.stages), plan.n_microbatches, plan.schedule)


def _alternative(plan: Plan) -> Alternative:
    return Alternative(
        plan.schedule,
        plan.n_microbatches,
        plan.prediction.step_s,
        tuple(len(stage.devices) for stage in plan.stages),
        tuple(stage.index for stage in plan.stages if stage.recompute),
        max(stage.memory_bytes for stage in plan.stages),
    )


def random_ops(facts: Mapping[str, OpFacts]) -> dict[str, bool]:
    """Name the ops that draw random numbers."""
    return {name: own.random for name, own in facts.items()}
