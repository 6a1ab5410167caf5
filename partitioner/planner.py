"""The planner: tries configurations, cuts for each, ranks by the simulator, and says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import ConstraintError
from ..runtime.schedules import GIVEN, SEARCH, TRAINING_SCHEDULES
from .analysis import OpFacts
from .captured import Capture
from .choice import Choice
from .closest import closest
from .cluster import Cluster
from .configurations import Wishes
from .drafts import Draft, counts_of, drafts_of, has_room
from .improving import in_orders_of_their_own
from .loss import Loss
from .placing import Groups
from .plan import Plan
from .pricing import Corrections, Pricer, Progress, silent
from .ranking import Configuration, fitted, rank
from .task import Task
from .timing import OPTIMIZERS
from .ways import ways_of


def make_plan(*args: Any, **kwargs: Any) -> Plan:
    """Choose stages, replicas, microbatches, schedule and recompute, without trying anything: see :func:`choose`."""
    return choose(*args, **kwargs).predicted()


def choose(
    capture: Capture,
    tensors: Sequence[torch.Tensor],
    cluster: Cluster,
    wishes: Wishes,
    *,
    threads_of: Callable[[int], int] | None = None,
    progress: Progress = silent,
    corrections: Corrections | None = None,
    loss: Loss | None = None,
) -> Choice:
    """Find plans of stages, replicas, microbatches, schedule and recompute for ``cluster``.

    ``tensors`` are the tensor leaves of an example call; the rows of the batched ones are the batch that the plan is
    for. ``threads_of`` gives the CPU threads of each worker for a number of workers; by default they share the cores of
    their host; ``corrections`` multiply the costs of ops; ``loss`` is priced on the last stage. Deterministic for equal
    costs. A microbatch count of the planner's own that the model refuses (BatchNorm wants more than one row) is left
    out.

    Raises:
        InfeasibleError: no cut fits the devices' memory, or there are fewer ops than stages.
        ConstraintError: the wishes contradict each other.
    """
    known = (*TRAINING_SCHEDULES, SEARCH)
    if wishes.schedule not in (None, GIVEN, *known):
        raise ConstraintError(f"schedule must be one of {', '.join(known)}, auto, or a file, got {wishes.schedule!r}")
    batched = [leaf.batched for leaf in capture.inputs.leaves if leaf.graph_input is not None]
    batch_rows = next(tensor.shape[0] for tensor, cut in zip(tensors, batched) if cut)
    if batch_rows < 1:
        raise ConstraintError("the example batch has no rows", hint="plan with a batch of the size to be trained with")
    _check_pieces(capture, cluster, wishes)
    _check_optimizer(cluster, wishes.optimizer)
    pricer = Pricer(
        capture,
        tensors,
        cluster,
        wishes.costs,
        progress,
        corrections,
        loss,
        wishes.optimizer,
        wishes.onednn_matmul,
    )
    threads_of = threads_of or _share_of_cores(cluster)
    return _Planner(Task(capture, pricer, cluster, wishes, batch_rows, threads_of, progress)).run()


def _check_optimizer(cluster: Cluster, optimizer: str | None) -> None:
    """Refuse an optimizer that cannot be priced."""
    if optimizer is None:
        return
    if optimizer not in OPTIMIZERS:
        raise ConstraintError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if all(device.kind.name == "cpu" for device in cluster.devices):
        raise ConstraintError(
            "with CPU workers the optimizer runs in your own process, on all weights, whatever the plan",
            hint="leave out optimizer=",
        )


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
    def __init__(self, task: Task) -> None:
        self.task = task
        self.ways = ways_of(task)

    def run(self) -> Choice:
        candidates = self._candidates()
        if not candidates:
            candidates = [closest(self.task, self.ways)]
        rivals = self._rivals()
        candidates = in_orders_of_their_own(self.task, candidates, rivals)
        asked_for = self.task.wishes.recompute is not None
        return Choice(tuple(sorted(candidates, key=rank)), tuple(rivals), tuple(self.task.failures), asked_for)

    def _candidates(self) -> list[Plan]:
        """Cut configurations without regard to memory; then make those fit that may still be the best.

        On few devices all are drafted, to be shown as alternatives; on many, pipelines are left to ``fitted``.
        """
        task = self.task
        drafts: list[Draft] = []
        untried: list[Configuration] = []
        for done, groups in enumerate(self.ways):
            task.progress("cutting for groups of devices", done, len(self.ways))
            cluster = task.cluster.with_groups(groups)
            if not has_room(task, cluster):
                continue
            counts = counts_of(task, cluster)
            if len(groups) == 1 or task.few_devices:
                made = self._drafts(cluster, counts)
                drafts += made or self._in_larger_pieces(cluster, counts[0])
            else:
                priced = [Configuration(cluster, n) for n in counts if task.price(cluster, n) is not None]
                untried += priced
                drafts += [] if priced else self._in_larger_pieces(cluster, counts[0])
        task.progress("cutting for groups of devices", len(self.ways), len(self.ways))
        return fitted(task, drafts, untried)

    def _drafts(self, cluster: Cluster, counts: Sequence[int]) -> list[Draft]:
        """Cut for groups of devices with each count of microbatches."""
        drafts: list[Draft] = []
        for n_microbatches in counts:
            is_known = self.task.has_price(cluster, n_microbatches)
            if cluster.n_stages == 1 and any(draft.fits for draft in drafts) and not is_known:
                continue  # it fits in larger pieces: smaller ones would have to be measured for little
            drafts += drafts_of(self.task, cluster, n_microbatches)
        return drafts

    def _in_larger_pieces(self, cluster: Cluster, n_microbatches: int) -> list[Draft]:
        """Halve the count of pieces until the model takes them, where it refuses all that were tried."""
        if self.task.wishes.n_microbatches is not None:
            return []
        while n_microbatches > 1 and not self.task.has_price(cluster, n_microbatches):
            n_microbatches //= 2
            found = drafts_of(self.task, cluster, n_microbatches)
            if found:
                return found
        return []

    def _rivals(self) -> list[Plan]:
        """Plan for one device and for plain data parallelism where the user's wishes leave them out, to compare."""
        task, cluster = self.task, self.task.cluster
        if task.wishes.assignment is not None or len(cluster.kinds) > 1:
            return []
        wanted: list[Groups] = [((0,),)]
        if cluster.n_devices > 1 and not task.has_fixed_rows:
            wanted.append((tuple(range(cluster.n_devices)),))
        drafts = [drafts_of(task, cluster.with_groups(groups), 1) for groups in wanted if groups not in self.ways]
        return fitted(task, [draft for of_groups in drafts for draft in of_groups])


def random_ops(facts: Mapping[str, OpFacts]) -> dict[str, bool]:
    """Name the ops that draw random numbers."""
    return {name: own.random for name, own in facts.items()}
