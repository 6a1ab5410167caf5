"""What a pipeline needs for its first call: capture, plan and split, then the engine that runs it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .errors import ConstraintError, StagecutError
from .partitioner.analysis import analyse
from .partitioner.capture import Capture, capture
from .partitioner.choice import Choice
from .partitioner.cluster import Cluster
from .partitioner.configurations import Wishes
from .partitioner.cpu import free_memory_bytes, usable_cores
from .partitioner.loss import Loss
from .partitioner.plan import Plan, parse
from .partitioner.planner import choose, random_ops
from .partitioner.recording.state import caches_found_once
from .partitioner.replan import better_plan, stage_seconds
from .partitioner.split import split
from .progress import shown_progress
from .randomness import kept_random_state
from .records import to_json
from .runtime.batchnorm import check_reachable
from .runtime.deadlines import RANK_S
from .runtime.engine import Engine, InlineEngine
from .runtime.groups import ensure_process_group
from .runtime.launch import WorkerPool
from .runtime.local import LocalEngine
from .runtime.options import Options
from .runtime.program import PipelineSpec, Timeline
from .runtime.spmd import SpmdEngine, share_text
from .runtime.trials import LEAST_STEPS, try_steps
from .runtime.watch.logs import PLAN
from .structure import call_leaves

_SHARE_OF_MEMORY = 0.8  # of what is free, that trials may take


@contextmanager
def planning() -> Iterator[None]:
    """Plan for training also where the first call happens to be an evaluation under ``torch.no_grad()``.

    The process's random state stays as it was: an op that draws random numbers is measured by running it.
    """
    with torch.inference_mode(False), torch.enable_grad(), kept_random_state(), caches_found_once():
        yield


def tensors_of(captured: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """List the tensors among a call's arguments that are inputs of the captured graph."""
    leaves, _ = call_leaves(captured.model.forward, args, kwargs)
    return [leaf for known, leaf in zip(captured.inputs.leaves, leaves) if known.graph_input is not None]


def loss_of_batch(
    loss_fn: Callable[..., Any] | None, target: Any, captured: Capture, tensors: Sequence[torch.Tensor]
) -> Loss | None:
    """Describe the loss of a batch for the planner, if it is known what it compares with."""
    if loss_fn is None or target is None:
        return None
    batched = [leaf.batched for leaf in captured.inputs.leaves if leaf.graph_input is not None]
    return Loss(loss_fn, target, next(tensor.shape[0] for tensor, cut in zip(tensors, batched) if cut))


def check_threads(n_threads: int | None) -> None:
    """Refuse a number of threads that no worker can compute with.

    Raises:
        ConstraintError: it is not positive.
    """
    if n_threads is not None and n_threads < 1:
        raise ConstraintError(f"threads_per_worker must be at least 1, got {n_threads}")


def constant(n_threads: int) -> Callable[[int], int]:
    """Give every worker so many threads, however many workers there are."""
    return lambda n_workers: n_threads


def check_stages(cluster: Cluster, stages: int | None) -> None:
    """Refuse a number of stages that contradicts the devices' grouping.

    Raises:
        ConstraintError: it does.
    """
    if stages is not None and cluster.groups is not None and stages != len(cluster.groups):
        raise ConstraintError(
            f"stages={stages} was asked for, and the devices are grouped into {len(cluster.groups)} stages",
            hint="leave out stages=, or give a flat list of devices without replicas=",
        )


class Builder:
    """Capture, plan and split for a first call; under torchrun rank 0 plans for all."""

    def __init__(
        self,
        model: nn.Module,
        cluster: Cluster,
        wishes: Wishes,
        known: Plan | None,
        opaque: Sequence[str],
        n_threads: int | None,
        launch: str,
        loss_fn: Callable[..., Any] | None,
        trial_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> None:
        if known is not None and n_threads is not None:
            known = replace(known, n_threads=n_threads)
        self.model, self.cluster, self.wishes, self.known = model, cluster, wishes, known
        self.opaque, self.n_threads, self.launch, self.loss_fn = opaque, n_threads, launch, loss_fn
        self.trial_s, self.timeout_s = trial_s, timeout_s or RANK_S
        self.target: Any = None  # an example of what the loss compares with
        self.can_step = False  # whether the arguments and the target at hand make a training step
        self.current: Plan | None = None
        self._undecided: tuple[Choice, list[Plan]]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[PipelineSpec, Plan]]:
        with planning():
            return self._build(args, kwargs)

    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[PipelineSpec, Plan]]:
        captured = self._capture(args, kwargs)
        tensors = tensors_of(captured, args, kwargs)
        if self.launch == "torchrun":
            ensure_process_group(self.timeout_s)
            text = share_text(lambda: json.dumps(to_json(self._plans(captured, tensors)[0])), self.timeout_s)
            plans = [parse(json.loads(text))]
        else:
            plans = self._plans(captured, tensors)
        self.current, self.target = plans[0], None
        for plan in plans:
            first, *table = str(plan).splitlines()
            PLAN.info("planned %s", first)
            for line in table:
                PLAN.debug("%s", line)
        return [(self._split(captured, tensors, plan), plan) for plan in plans]

    def try_out(self, steps: Sequence[Callable[[], None]]) -> tuple[int, Plan]:
        """Take the contender whose steps are fastest."""
        choice, contenders = self._undecided
        with shown_progress() as progress:
            trial = try_steps(steps, self.trial_s, progress)
        taken, self.current = choice.settled(contenders, trial.step_s, trial.n_steps)
        return taken, self.current

    def without_trial(self, problem: Exception) -> tuple[int, Plan]:
        """Take the contender that is predicted to be fastest."""
        choice, _ = self._undecided
        self.current = choice.predicted(f"not tried: {type(problem).__name__}: {problem}")
        return 0, self.current

    def replan(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], measure: Callable[[], Timeline], gain: float
    ) -> tuple[PipelineSpec, Plan] | None:
        """Plan again with measured costs, corrected by what ``measure`` returns; None if no plan is faster by ``gain``.

        Raises:
            StagecutError: under torchrun.
        """
        if self.launch == "torchrun":
            raise StagecutError(
                "under torchrun every rank owns its stage's weights, so the cut cannot move while it runs",
                hint="save pm.state_dict(), start again, and load it after stagecut.compile(...), which plans anew",
            )
        assert self.current is not None
        timeline = measure()
        with planning():
            captured = self._capture(args, kwargs)
            tensors = tensors_of(captured, args, kwargs)
            loss, self.target = loss_of_batch(self.loss_fn, self.target, captured, tensors), None
            seconds = stage_seconds(timeline, self.current.timing.action_s, self.current.timing.split)
            wishes = replace(self.wishes, costs="measured")
            with shown_progress() as progress:
                chosen = better_plan(
                    captured,
                    tensors,
                    self.cluster,
                    wishes,
                    self.current,
                    seconds,
                    gain,
                    self._threads_of(),
                    progress,
                    loss,
                )
            if chosen is None:
                return None
            self.current = chosen
            return self._split(captured, tensors, chosen), chosen

    def _threads_of(self) -> Callable[[int], int] | None:
        return None if self.n_threads is None else constant(self.n_threads)

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        begin = time.perf_counter()
        captured = capture(self.model, args, kwargs, opaque=self.opaque)
        what = type(self.model).__name__, len(captured.graph.nodes), len(captured.opaque), time.perf_counter() - begin
        PLAN.info("captured %s: %d ops, %d of them opaque, in %.2f s", *what)
        for call in captured.opaque:
            PLAN.debug("opaque: %s", call)
        return captured

    def _split(self, captured: Capture, tensors: list[torch.Tensor], chosen: Plan) -> PipelineSpec:
        facts = analyse(captured, tensors, tensors[0].shape[0] if tensors[0].dim() else 1)
        return split(captured, chosen, random_ops(facts))

    def _plans(self, captured: Capture, tensors: list[torch.Tensor]) -> list[Plan]:
        """List the plan to run; or several, of which trials are to choose."""
        if self.known is not None:
            return [self.known]
        with shown_progress() as progress:
            choice = choose(
                captured,
                tensors,
                self.cluster,
                self.wishes,
                threads_of=self._threads_of(),
                progress=progress,
                loss=loss_of_batch(self.loss_fn, self.target, captured, tensors),
            )
        contenders = choice.contenders() if self.wishes.costs == "measured" and self.trial_s > 0 else []
        if self.launch != "local" or len(contenders) < 2:
            return [choice.predicted()]
        while len(contenders) > 2 and _least_s(contenders) > self.trial_s:
            contenders.pop()  # the one that is predicted to be slowest
        obstacle = self._obstacle(contenders)
        if obstacle is not None:
            return [choice.predicted(f"not tried, though predictions are too close to tell: {obstacle}")]
        self._undecided = choice, contenders
        return contenders

    def _obstacle(self, contenders: Sequence[Plan]) -> str | None:
        """Say what keeps plans from being tried side by side."""
        if not self.can_step:
            return "this call is no training step, with a target for the loss"
        if _least_s(contenders) > self.trial_s:
            return f"it would take {_least_s(contenders):.0f} s, and trial_s is {self.trial_s:g}"
        n_bytes = sum(sum(plan.worker_bytes) for plan in contenders)
        if n_bytes > _SHARE_OF_MEMORY * free_memory_bytes():
            return f"all at once they need {n_bytes / 2**30:.1f} GiB, more than is free"
        return None


def _least_s(contenders: Sequence[Plan]) -> float:
    """Return the seconds of the shortest trial, as predicted."""
    return LEAST_STEPS * sum(plan.prediction.step_s for plan in contenders)


class Launcher:
    """Starts the engine of a pipeline; local workers start at once, beside the planning."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        launch: str,
        n_threads: int | None,
        timeout_s: float | None,
        n_workers: int,
        options: Options,
    ) -> None:
        self.model, self.loss_fn, self.launch, self.timeout_s = model, loss_fn, launch, timeout_s
        self.options = options
        share = max(1, usable_cores() // n_workers) if n_threads is None else n_threads
        self.pool = WorkerPool(n_workers, share) if launch == "local" else None

    def __call__(self, spec: PipelineSpec) -> Engine:
        check_reachable(spec.stages, spec.layout, self.options.stage.batchnorm)
        if self.launch == "inline":
            return InlineEngine(spec, self.model, self.loss_fn, self.options)
        if self.launch == "torchrun":
            return SpmdEngine(spec, self.model, self.loss_fn, self.timeout_s or RANK_S, self.options)
        pool = self.pool if self.pool is not None else WorkerPool(spec.layout.n_workers, spec.n_threads)
        self.pool = None
        pool.keep(spec.layout.n_workers, spec.n_threads)
        return LocalEngine(spec, self.model, self.loss_fn, pool, self.timeout_s, self.options)

    def release(self) -> None:
        """Let workers go that were started and never used."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None
