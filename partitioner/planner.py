"""The planner: tries configurations, cuts for each, ranks by the simulator, and says why."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
from .cut_result import Cut
from .cutting import Cutter, Recompute, Stages
from .explain import advice_of, describe_groups, describe_shape, reasons
from .loss import Loss
from .plan import Alternative, Plan
from .pricing import Corrections, Priced, Pricer, Progress, silent

_SOLVE_S = 20.0
_MOST_TIGHTENINGS = 6
_SLACKS = (1.1, 1.5)  # of the limits, for cuts of which the plan may hold less than the cut says
_WORTH_FITTING = 1.25  # configurations that are slower by more, even if memory did not matter, are not looked into
_KEPT = 12
_MOST_HALVINGS = 10
_PATIENCE_S = 10.0  # for finding out what would fit


def make_plan(
    capture: Capture,
    tensors: Sequence[torch.Tensor],
    cluster: Cluster,
    wishes: Wishes,
    *,
    threads_of: Callable[[int], int] | None = None,
    progress: Progress = silent,
    corrections: Corrections | None = None,
    loss: Loss | None = None,
) -> Plan:
    """Choose stages, replicas, microbatches, schedule and recompute for ``cluster``.

    ``tensors`` are the tensor leaves of an example call; the rows of the batched ones are the batch that the plan is
    for. ``threads_of`` gives the CPU threads of each worker for a number of workers; by default they share the cores of
    their host; ``corrections`` multiply the costs of ops; ``loss`` is priced on the last stage. Deterministic for equal
    costs. A microbatch count of the planner's own that the model refuses (BatchNorm wants more than one row) is left
    out.

    Raises:
        InfeasibleError: no cut fits the devices' memory, or there are fewer ops than stages.
        ConstraintError: the wishes contradict each other.
    """
    if wishes.schedule not in (None, *TRAINING_SCHEDULES):
        raise ConstraintError(f"schedule must be one of {', '.join(TRAINING_SCHEDULES)}, got {wishes.schedule!r}")
    batched = [leaf.batched for leaf in capture.inputs.leaves if leaf.graph_input is not None]
    batch_rows = next(tensor.shape[0] for tensor, cut in zip(tensors, batched) if cut)
    if batch_rows < 1:
        raise ConstraintError("the example batch has no rows", hint="plan with a batch of the size to be trained with")
    _check_pieces(capture, cluster, wishes)
    pricer = Pricer(capture, tensors, cluster, wishes.costs, progress, corrections, loss)
    threads_of = threads_of or _share_of_cores(cluster)
    return _Planner(capture, pricer, cluster, wishes, batch_rows, threads_of, progress).run()


def _check_pieces(capture: Capture, cluster: Cluster, wishes: Wishes) -> None:
    """Refuse pieces of a batch that cannot be cut."""
    n_replicas = 1 if cluster.groups is None else max(map(len, cluster.groups))
    if capture.inputs.rows is not None and max(n_replicas, wishes.n_microbatches or 1) > 1:
        raise ConstraintError(
            f"this model computes with batches of {capture.inputs.rows} rows only, so neither microbatches nor "
            "replicas can have a part of them",
            hint="microbatches=1 and no replicas, or write the model without fixed batch sizes",
        )


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
        progress: Progress,
    ) -> None:
        self.capture, self.pricer, self.cluster, self.wishes = capture, pricer, cluster, wishes
        self.batch_rows, self.threads_of, self.progress = batch_rows, threads_of, progress
        self.cutter = Cutter(_SOLVE_S)
        self.failures: list[Exception] = []
        self.ways = self._ways()

    def run(self) -> Plan:
        candidates = self._candidates(self.ways)
        if not candidates:
            candidates = [self._closest()]
        rivals = self._rivals()
        ranked = sorted(candidates, key=_rank)
        chosen = ranked[0]
        others = _kept(sorted([*ranked[1:], *rivals], key=_rank))
        alone = [plan.prediction.step_s for plan in (*candidates, *rivals) if len(plan.devices) == 1]
        one_device_s = min([*alone, chosen.prediction.one_device_s])
        chosen = replace(
            chosen,
            prediction=replace(chosen.prediction, one_device_s=one_device_s),
            alternatives=tuple(map(_alternative, others)),
        )
        asked_for = self.wishes.recompute is not None
        return replace(chosen, reasons=reasons(chosen, ranked[1:], rivals, self.failures, asked_for))

    def _ways(self) -> list[Groups]:
        """List the groups of devices to try; pipelines first: one device then reuses sizes that have a price."""
        ways = uniform_groups(self.cluster, self.wishes)
        if self.capture.inputs.rows is not None:
            ways = [groups for groups in ways if max(map(len, groups)) == 1] or ways
        ways += [groups for groups in self._unequal_ways() if groups not in ways]
        if not ways:
            if self.failures:
                raise next(filter(_says_what_to_do, self.failures), self.failures[0])
            kinds = ", ".join(kind.name for kind in self.cluster.kinds)
            raise ConstraintError(
                f"{self.cluster.n_devices} devices ({kinds}) do not divide into {self.wishes.n_stages} stages of "
                "equally many devices of one kind",
                hint="give the devices of each stage: replicas=[2, 1], or nested: devices=[[0, 1], [2]]",
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
            try:
                only = n % n_stages > 0 and self.wishes.n_stages is not None
                sizes = self.cutter.unequal_groups(priced, cluster, n_stages, n_pieces, self._modes(), diagnose=only)
            except InfeasibleError as error:
                self.failures.append(InfeasibleError(error.message, hint=", or ".join(advice_of(error)) or None))
                continue
            ends = [sum(sizes[: s + 1]) for s in range(len(sizes))]
            ways.append(tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends)))
        return ways

    def _candidates(self, ways: Sequence[Groups]) -> list[Plan]:
        """Cut every configuration without regard to memory; then make those fit that may still be the best."""
        drafts: list[_Draft] = []
        for done, groups in enumerate(ways):
            self.progress("cutting for groups of devices", done, len(ways))
            for count in microbatch_counts(self.wishes, groups, self.batch_rows, self.capture.inputs.rows is not None):
                cluster = self.cluster.with_groups(groups)
                if len(groups) == 1 and any(draft.fits and draft.cluster == cluster for draft in drafts):
                    rows = rows_of(groups, count, self.batch_rows)
                    if not self.pricer.is_known(rows, self.threads_of(cluster.n_devices)):
                        continue  # it fits in larger pieces: smaller ones would have to be measured for little
                drafts += self._drafts(cluster, count)
            drafts += self._in_larger_pieces(drafts, groups)
        self.progress("cutting for groups of devices", len(ways), len(ways))
        return self._fitted(drafts)

    def _in_larger_pieces(self, drafts: Sequence[_Draft], groups: Groups) -> list[_Draft]:
        """Halve the count of pieces until the model takes them, where it refuses all that were tried."""
        cluster = self.cluster.with_groups(groups)
        if self.wishes.n_microbatches is not None or any(draft.cluster == cluster for draft in drafts):
            return []
        count = microbatch_counts(self.wishes, groups, self.batch_rows, self.capture.inputs.rows is not None)[0]
        while count > 1 and not self.pricer.is_known(
            rows_of(groups, count, self.batch_rows), self.threads_of(cluster.n_devices)
        ):
            count //= 2
            found = self._drafts(cluster, count)
            if found:
                return found
        return []

    def _fitted(self, drafts: Sequence[_Draft]) -> list[Plan]:
        """Make drafts fit in memory, best first; those that lose to a fitting one by far are left out."""
        found: list[Plan] = []
        best_s = float("inf")
        worth = _WORTH_FITTING if self.cluster.n_devices <= FEW_DEVICES else 1.0
        for done, draft in enumerate(sorted(drafts, key=lambda draft: _rank(draft.plan)), 1):
            self.progress("fitting plans into memory", done, len(drafts))
            if draft.plan.prediction.step_s > best_s * worth and not draft.fits:
                continue  # memory only makes it slower
            try:
                plan = draft.plan if draft.fits else self._fitting(draft)
            except InfeasibleError as error:
                self.failures.append(_of_shape(draft.cluster, error))
                continue
            found.append(plan)
            best_s = min(best_s, plan.prediction.step_s)
        return found

    def _drafts(self, cluster: Cluster, count: int) -> list[_Draft]:
        """Cut for groups of devices and a microbatch count without memory limits, for each schedule."""
        assert cluster.groups is not None
        rows = rows_of(cluster.groups, count, self.batch_rows)
        try:
            priced = self.pricer.at(rows, self.threads_of(cluster.n_devices))
        except Exception as error:
            self.failures.append(error)
            return []
        n_pieces = n_pieces_of(cluster.groups, count, self.batch_rows)
        drafts = []
        for schedule in self._schedules(len(cluster.groups)):
            mode: Recompute = "always" if self.wishes.recompute else "never"
            try:
                self._check_state(priced, cluster)
                stages = self._stages(priced, cluster, schedule, n_pieces, mode, [float("inf")] * cluster.n_stages)
            except InfeasibleError as error:
                self.failures.append(_of_shape(cluster, error))
                continue
            decision = Decision(cluster, stages.stage_of, stages.recompute, schedule, count, stages.cut)
            plan = assemble(self.capture, priced, decision, self.batch_rows)
            drafts.append(_Draft(plan, priced, cluster, schedule, count, n_pieces, stages.cut))
        return drafts

    def _schedules(self, n_stages: int) -> tuple[str, ...]:
        if self.wishes.schedule is not None:
            return (self.wishes.schedule,)
        # Fill-drain holds more for nearly the same step: with one stage, or with many, it is not worth the search.
        return TRAINING_SCHEDULES if 1 < n_stages <= FEW_DEVICES else ("1f1b",)

    def _check_state(self, priced: Priced, cluster: Cluster) -> None:
        """Refuse at once what cannot even hold its parameters.

        Raises:
            InfeasibleError: parameters, gradients and optimizer state alone need more than all stages have.
        """
        assert cluster.groups is not None
        limits = _limits(cluster)
        graph = priced.graph
        state = sum(node["memory_bytes"] for _, node in graph.nodes(data=True))
        state += sum(entry["memory_bytes"] for entry in graph.graph["shared"])
        if state > sum(limits):
            raise InfeasibleError(
                f"parameters with gradients and optimizer state need {state:,.0f} bytes, and "
                f"{_count(cluster.n_stages, 'stage')} can hold {sum(limits):,.0f}",
                hint=f"use at least {-(-state // max(limits)):,.0f} stages of such devices",
            )

    def _fitting(self, draft: _Draft) -> Plan:
        """Cut within the limits, without recompute first; with it where nothing else fits.

        The cut counts some bytes that a plan does not hold (views of what arrived, say): larger limits are tried too.
        """
        failures: list[InfeasibleError] = []
        for slack in (1.0, *_SLACKS) if self.cluster.n_devices <= FEW_DEVICES else (1.0,):
            for mode in self._modes():
                try:
                    return self._within_limits(draft, mode, slack)
                except InfeasibleError as error:
                    failures.append(error)
        raise failures[len(self._modes()) - 1]

    def _modes(self) -> tuple[Recompute, ...]:
        """List the ways to recompute that may be tried, in that order."""
        if self.wishes.recompute is None and self.cluster.n_devices > FEW_DEVICES:
            return ("choose",)  # the same answer where nothing is recomputed, and one search less
        if self.wishes.recompute is None:
            return ("never", "choose")
        return ("always",) if self.wishes.recompute else ("never",)

    def _within_limits(self, draft: _Draft, mode: Recompute, slack: float = 1.0) -> Plan:
        """Tighten the limits of the cut by what it does not count (values held for wires) until the plan fits."""
        cluster, limits = draft.cluster, _limits(draft.cluster)
        allowed = [slack * limit - extra for limit, extra in zip(limits, draft.uncounted_bytes)]
        closest: tuple[float, list[float], Plan] | None = None
        for _ in range(_MOST_TIGHTENINGS):
            try:
                stages = self._stages(draft.priced, cluster, draft.schedule, draft.n_pieces, mode, allowed)
            except InfeasibleError:
                if closest is None and slack == 1.0 and allowed != limits:
                    allowed = list(limits)  # another cut may hold less that is not counted
                    continue
                if closest is None:
                    raise
                break  # nothing is left that holds as much less as the last one was over
            decision = Decision(
                cluster, stages.stage_of, stages.recompute, draft.schedule, draft.n_microbatches, stages.cut
            )
            plan = assemble(self.capture, draft.priced, decision, self.batch_rows)
            over = _over(plan, limits)
            if max(over) <= 0:
                return self._spared(draft, decision, plan)
            if closest is None or max(over) < closest[0]:
                closest = max(over), over, plan
            allowed = [limit - 1.05 * max(0.0, excess) for limit, excess in zip(allowed, over)]
        assert closest is not None
        _, over, plan = closest
        worst = max(range(len(over)), key=over.__getitem__)
        raise InfeasibleError(
            f"under {draft.schedule} with {draft.n_microbatches} microbatches stage {worst} on "
            f"{', '.join(cluster.stages[worst])} needs {plan.stages[worst].memory_bytes:,.0f} bytes, "
            f"{over[worst]:,.0f} more than its {limits[worst]:,.0f}",
            hint=f"raise memory_bytes by {over[worst]:,.0f}, or use more devices or smaller microbatches",
        )

    def _spared(self, draft: _Draft, decision: Decision, plan: Plan) -> Plan:
        """Let stages that fit without recompute do without: the search only cares about the slowest stage."""
        if self.wishes.recompute is not None:
            return plan
        for s in (stage.index for stage in plan.stages if stage.recompute):
            again = tuple(on and other != s for other, on in enumerate(decision.recompute))
            fewer = replace(decision, recompute=again)
            tried = assemble(self.capture, draft.priced, fewer, self.batch_rows)
            if tried.stages[s].memory_bytes <= _limits(draft.cluster)[s]:
                decision, plan = fewer, tried
        return plan

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

    def _closest(self) -> Plan:
        """Search for what would fit, in the configuration that is closest to it with the smallest pieces.

        Raises:
            InfeasibleError: nothing fits; it says what would.
        """
        ways = self.ways if self.wishes.assignment is None else []
        drafts = [draft for groups in ways if (draft := self._frugal(groups)) is not None]
        if not drafts:
            raise next(filter(_says_what_to_do, self.failures), self.failures[0])
        return self._with_least_more(min(drafts, key=self._least_over))

    def _least_over(self, draft: _Draft) -> float:
        """Return by how much the draft is over its limits, with all the recompute that it may have."""
        again = (self.wishes.recompute is not False,) * len(draft.plan.stages)
        decision = Decision(draft.cluster, draft.plan.stage_of, again, draft.schedule, draft.n_microbatches)
        return max(_over(assemble(self.capture, draft.priced, decision, self.batch_rows), _limits(draft.cluster)))

    def _frugal(self, groups: Groups) -> _Draft | None:
        """Cut for groups of devices, without memory limits, in the smallest pieces that have a price."""
        counts = microbatch_counts(self.wishes, groups, self.batch_rows, self.capture.inputs.rows is not None)
        raised = _with_more_memory(self.cluster.with_groups(groups), float("inf"))
        for count in reversed(counts):
            if self.pricer.is_known(rows_of(groups, count, self.batch_rows), self.threads_of(raised.n_devices)):
                for draft in self._drafts(raised, count):
                    return replace(draft, cluster=self.cluster.with_groups(groups))
        return None

    def _with_least_more(self, draft: _Draft) -> Plan:
        """Halve what every limit is raised by while a plan is still found; it may turn out to fit as they are.

        Raises:
            InfeasibleError: it does not; it advises what was found to be enough.
        """
        limits, deadline = _limits(draft.cluster), time.monotonic() + _PATIENCE_S
        low, high = 0, math.ceil(max(_over(draft.plan, limits)))
        plan = draft.plan
        found = False
        for _ in range(_MOST_HALVINGS):
            extra = (low + high) // 2 if found else high
            if found and (high - low <= high // 64 or time.monotonic() > deadline):
                break
            try:
                plan = self._fitting(replace(draft, cluster=_with_more_memory(draft.cluster, extra)))
                high, found = extra, True
            except InfeasibleError:
                low, high = extra, high if found else 2 * high
        over = _over(plan, limits)
        if max(over) <= 0:
            stages = (replace(stage, memory_limit_bytes=limit) for stage, limit in zip(plan.stages, limits))
            return replace(plan, stages=tuple(stages))
        worst = max(range(len(over)), key=over.__getitem__)
        more = [f"raise memory_bytes by {high:,}"] if found else []
        raise InfeasibleError(
            f"no plan was found that fits in memory: the closest one, {describe_shape(plan)} under {plan.schedule} in "
            f"{_count(plan.n_microbatches, 'microbatch')}, puts {plan.stages[worst].memory_bytes:,} bytes on stage "
            f"{worst} on {', '.join(plan.stages[worst].devices)}, {math.ceil(over[worst]):,} more than its "
            f"{limits[worst]:,.0f}",
            hint=", or ".join([*more, *self._advice(draft)]) or None,
        )

    def _advice(self, draft: _Draft) -> list[str]:
        """Ask the cut what else would fit."""
        limits = _limits(draft.cluster)
        mode = self._modes()[-1]
        try:
            self.cutter.cut(draft.priced, draft.cluster, draft.schedule, draft.n_pieces, mode, limits, diagnose=True)
        except InfeasibleError as error:
            return [line for line in advice_of(error) if not line.startswith("raise")]
        return []

    def _rivals(self) -> list[Plan]:
        """Plan for one device and for plain data parallelism where the user's wishes leave them out, to compare."""
        cluster = self.cluster
        if self.wishes.assignment is not None or len(cluster.kinds) > 1:
            return []
        wanted: list[Groups] = [((0,),)]
        if cluster.n_devices > 1 and self.capture.inputs.rows is None:
            wanted.append((tuple(range(cluster.n_devices)),))
        drafts = [self._drafts(cluster.with_groups(groups), 1) for groups in wanted if groups not in self.ways]
        return self._fitted([draft for of_groups in drafts for draft in of_groups])


@dataclass(frozen=True)
class _Draft:
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
        return all(stage.memory_bytes <= limit for stage, limit in zip(self.plan.stages, _limits(self.cluster)))


def _over(plan: Plan, limits: Sequence[float]) -> list[float]:
    """Return how many bytes each stage is over its limit."""
    return [stage.memory_bytes - limit for stage, limit in zip(plan.stages, limits)]


def _with_more_memory(cluster: Cluster, extra: float) -> Cluster:
    """Give every device so many bytes more."""
    kinds = {kind: replace(kind, memory_bytes=kind.memory_bytes + extra) for kind in cluster.kinds}
    return replace(cluster, devices=tuple(replace(device, kind=kinds[device.kind]) for device in cluster.devices))


def _limits(cluster: Cluster) -> list[float]:
    """Return the bytes that each stage's devices have."""
    assert cluster.groups is not None
    return [min(cluster.devices[index].kind.memory_bytes for index in group) for group in cluster.groups]


def _kept(ranked: Sequence[Plan]) -> list[Plan]:
    """Leave out what is far behind, except one device and data parallelism, which everything is compared with."""
    kept = list(ranked[:_KEPT])
    for plan in ranked[_KEPT:]:
        if len(plan.stages) == 1 and all(describe_shape(plan) != describe_shape(other) for other in kept):
            kept.append(plan)
    return kept


def _of_shape(cluster: Cluster, error: InfeasibleError) -> InfeasibleError:
    """Say of which stages an error speaks."""
    assert cluster.groups is not None
    shape = describe_groups([len(group) for group in cluster.groups])
    return InfeasibleError(f"{shape}: {error.message}", hint=error.hint)


def _says_what_to_do(error: Exception) -> bool:
    return isinstance(error, InfeasibleError) and error.hint is not None


def _count(n: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("h") else f"{what}s"
    return f"{n} {what if n == 1 else plural}"


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
