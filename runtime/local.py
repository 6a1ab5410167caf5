"""The local engine: one process per worker, owned by this process, and replaced by others if one is lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import StageError, WorkerLost
from .batchnorm import replicas_of, synced_stages
from .deadlines import Deadlines
from .engine import Programs, model_state, modes_of
from .gradients import own_norm
from .launch import WorkerPool
from .local_messages import Done
from .local_workers import Conditions, LocalWorkers
from .options import Options
from .program import PipelineSpec, Program
from .requests import BACKWARD, FORWARD, TRAIN, StepReport, StepRequest
from .shared_model import Before, SharedModel
from .unsynced import Unsynced
from .watch.logs import WORKERS
from .watch.residents import Resident, resident

RESTART, RAISE = "restart", "raise"


@dataclass(frozen=True)
class _Call:
    """A request with what it takes to carry it out again, to the same numbers; ``versions`` are those of parameters."""

    request: StepRequest
    before: Before
    conditions: Conditions
    versions: dict[str, int]


class LocalEngine:
    """Run a pipeline on subprocesses of this one.

    Nothing that a step needs is in a worker alone: weights and buffers are in memory that the parent holds, inputs and
    seeds in the request. So a worker that is lost costs the step: all workers are started anew, what the step has
    changed is undone, the forwards whose activations are gone are run again, and then the step. Numbers are the same.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        pool: WorkerPool,
        timeout_s: float | None,
        options: Options,
    ) -> None:
        self.n_threads = pool.n_threads
        self.unsynced = Unsynced()
        self._spec = spec
        self._model = model
        self._loss_fn = loss_fn
        self._options = options
        self._deadlines = Deadlines(timeout_s, spec.step_s, compiles=options.stage.compiler is not None)
        self._synced = synced_stages(spec.stages, spec.layout, options.stage.batchnorm)
        self.n_together = replicas_of(self._synced, spec.layout)
        self._programs = Programs(spec, self._synced)
        self._open: dict[int, _Call] = {}  # forwards whose backward may come
        self._residents: dict[int, Resident] = {}  # of workers on accelerators, as they said last
        self._parts: dict[int, tuple[str, ...]] = {}  # per worker, the gradients that no replica has summed
        try:
            self._shared = SharedModel(spec, model, options.weights)
            self._workers = self._started(pool)
            self._shared.fills.clear()  # new workers will find the values where they are
        except BaseException:
            pool.kill()
            if hasattr(self, "_shared"):
                self._shared.take_back()
            self._close_memory()
            raise

    def _started(self, pool: WorkerPool) -> LocalWorkers:
        return LocalWorkers(self._spec, self._shared, self._loss_fn, pool, self._deadlines, self._options, self._synced)

    @property
    def pool(self) -> WorkerPool:
        """Return the processes at work."""
        return self._workers.pool

    def run(self, request: StepRequest) -> StepReport:
        """Carry out one request; on failure every worker is ended and the worker's own exception is raised.

        Raises:
            WorkerLost: a worker ended, and was not to be replaced, or its replacement ended too.
        """
        trains = request.kind in (TRAIN, BACKWARD)
        names = self.unsynced.resume() if trains else frozenset()
        goes_on = {worker: tuple(n for n in own if n in names) for worker, own in self._parts.items()}
        self._shared.bind()
        self._shared.refresh_copies()
        versions = self._shared.versions() if request.kind in (FORWARD, BACKWARD) else {}
        if request.kind == BACKWARD and request.call in self._open:
            _check_unchanged(self._open[request.call].versions, versions)
        if trains:
            self._shared.release_gradient_slots()
        conditions = Conditions(self._shared.trainable(), modes_of(self._model))
        before = self._shared.before_a_step([(worker, name) for worker, own in goes_on.items() for name in own])
        call = _Call(request, before, conditions, versions)
        try:
            done, n_restarts = self._carried_out(call, goes_on)
        except BaseException:
            self._shared.as_before(before)  # a step that failed changes nothing: it may be done again
            raise
        if request.kind == FORWARD:
            self._open[request.call] = call
        elif request.kind == BACKWARD:
            self._open.pop(request.call, None)
        report = self._accepted(request, done)
        report.n_restarts = n_restarts
        return report

    def _carried_out(self, call: _Call, goes_on: dict[int, tuple[str, ...]]) -> tuple[dict[int, Done], int]:
        """Return what the workers answer, and how often they had to be replaced for it."""
        try:
            return self._attempt(call, goes_on), 0
        except WorkerLost as lost:
            if self._options.on_worker_lost != RESTART:
                raise
            return self._again(call, goes_on, lost), 1

    def _attempt(self, call: _Call, goes_on: dict[int, tuple[str, ...]]) -> dict[int, Done]:
        key = self._programs.key_of(call.request)
        return self._workers.run(call.request, key, self._programs.get(key), call.conditions, goes_on)

    def _again(self, interrupted: _Call, goes_on: dict[int, tuple[str, ...]], lost: WorkerLost) -> dict[int, Done]:
        """Do a step again that lost a worker, with new ones; once.

        Raises:
            WorkerLost: a worker was lost again.
        """
        told = f"stagecut: {lost.message}; all workers are started anew, and the step is done again"
        warnings.warn(told, stacklevel=7)  # of the caller of pm.step
        self._residents.clear()
        WORKERS.warning("step %d is done again by new workers", interrupted.request.step)
        self._workers.close(kill=True)
        self._deadlines.forget()
        try:
            self._workers = self._started(WorkerPool(self._spec.layout.n_workers, self.n_threads))
            for opened in self._open.values():
                self._shared.as_before(opened.before)
                self._attempt(opened, {})
            self._shared.as_before(interrupted.before)
            return self._attempt(interrupted, goes_on)
        except WorkerLost as again:
            again.message += "; and so was the one before it, in the same step"
            raise again from lost

    def _accepted(self, request: StepRequest, done: dict[int, Done]) -> StepReport:
        report = StepReport()
        for worker, answer in done.items():
            report.merge(answer.report)
            if answer.resident is not None:
                self._residents[worker] = answer.resident
        if request.kind in (TRAIN, BACKWARD):
            self._parts = {} if request.sync else {worker: answer.parts for worker, answer in done.items()}
            has_gradient = {worker: answer.has_gradient for worker, answer in done.items()}
            self._shared.accept_gradients(has_gradient, None if request.sync else self.unsynced)
        return report

    def forget(self, call: int) -> None:
        """Drop the activations of a forward whose backward will not come."""
        self._open.pop(call, None)
        self._workers.forget(call)

    def common_seed(self, seed: int) -> int:
        """Return ``seed``: one process draws it for all workers."""
        return seed

    def full_state(self) -> dict[str, torch.Tensor]:
        """Return the model's own state; it is the workers' too."""
        return model_state(self._model)

    def gradient_norm(self, norm_type: float) -> torch.Tensor:
        """Return the norm of the model's own gradients; the workers have handed them over."""
        return own_norm(self._model.parameters(), norm_type)

    def program_of(self, request: StepRequest) -> Program:
        """Return the program that a request runs."""
        return self._programs.get(self._programs.key_of(request))

    def positions(self) -> dict[int, int]:
        """Return the instruction that each worker began last; after a failure, where they were ended."""
        return dict(enumerate(self._shared.progress.tolist()))

    def residents(self) -> dict[int, Resident]:
        """Return the workers' processes; none after they were ended."""
        own = {w.index: resident(self._spec.devices[w.index], w.process.pid) for w in self.pool.workers}
        return {worker: self._residents.get(worker, found) for worker, found in own.items()}

    def gathered(self, text: str) -> list[str]:
        """Return the text: this process knows of all workers."""
        return [text]

    def close(self) -> None:
        """Let the workers go; those of a step that failed have been ended."""
        self._open.clear()
        self._workers.close()
        self._close_memory()

    def _close_memory(self) -> None:
        if hasattr(self, "_shared"):
            self._shared.give_back()
            self._shared.arena.close()


def _check_unchanged(before: dict[str, int], now: dict[str, int]) -> None:
    """Refuse a backward with other weights than its forward's, as autograd does: workers would not notice.

    Raises:
        StageError: a parameter was changed in place.
    """
    changed = [name for name, version in before.items() if now[name] != version]
    if changed:
        raise StageError(
            f"{changed[0]} was changed between a forward and its backward (and {len(changed) - 1} other parameters): "
            "gradients would be of neither weights",
            hint="call optimizer.step() after loss.backward()",
        )
