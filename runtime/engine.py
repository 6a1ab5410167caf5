"""Engines: where a pipeline's workers live. This one is the interface, and the mode in which all of them live here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import ConstraintError, StagecutError
from .batchnorm import synced_stages
from .executor import Executor
from .gradients import own_norm
from .options import Options
from .program import PipelineSpec, Program, check, lower
from .replicate import NoReduction, Reducer
from .requests import BACKWARD, PROGRAM_OF, TRAIN, StepReport, StepRequest
from .schedules import Orders, computed_by, of_columns, of_part, shortened
from .stage import StageRuntime, isolated_randomness
from .transport import InlineTransport, MessageKey
from .unsynced import Unsynced
from .watch.residents import Resident, resident
from .weights import fill_in


class Engine(Protocol):
    """Runs requests on the workers of one pipeline and leaves gradients in the model's ``.grad``.

    ``n_threads`` is how many CPU threads each worker computes with; ``unsynced`` are gradients that replicas have yet
    to sum; ``n_together`` says how many microbatches BatchNorms normalise as one.
    """

    n_threads: int
    unsynced: Unsynced
    n_together: int

    def run(self, request: StepRequest) -> StepReport:
        """Carry out one request on all workers; raises what a worker raised."""

    def forget(self, call: int) -> None:
        """Drop the activations of a forward whose backward will not come."""

    def common_seed(self, seed: int) -> int:
        """Return the seed that every process uses where each drew one."""

    def full_state(self) -> dict[str, torch.Tensor]:
        """Return every parameter and buffer of the model by name, from the workers that own them."""

    def gradient_norm(self, norm_type: float) -> torch.Tensor:
        """Return the norm of all gradients of the model as one vector."""

    def program_of(self, request: StepRequest) -> Program:
        """Return the program that a request runs."""

    def positions(self) -> dict[int, int]:
        """Return where each worker is among its instructions, or was when a request failed: those that are known."""

    def residents(self) -> dict[int, Resident]:
        """Return the process of each worker that this one can ask the system about."""

    def gathered(self, text: str) -> list[str]:
        """Return this text from every process that holds such an engine."""

    def close(self) -> None:
        """End what the engine started; safe to call twice."""


class Programs:
    """The programs of one pipeline, lowered and checked when a microbatch count is first seen."""

    def __init__(self, spec: PipelineSpec, in_lockstep: frozenset[int] = frozenset()) -> None:
        """Take the stages whose replicas wait for each other inside of forwards and backwards."""
        self._spec = spec
        self._in_lockstep = in_lockstep
        self._known: dict[tuple[str, int], Program] = {}

    def key_of(self, request: StepRequest) -> tuple[str, int]:
        """Name the program that a request runs."""
        return (PROGRAM_OF.get(request.kind, self._spec.schedule), request.n_microbatches)

    def get(self, key: tuple[str, int]) -> Program:
        """Return the checked program of that name and microbatch count."""
        if key not in self._known:
            name, n_microbatches = key
            program = lower(
                name, self._spec.layout, self._orders(name, n_microbatches), n_microbatches, self._in_lockstep
            )
            check(program, computes=computed_by(name), in_lockstep=self._in_lockstep)
            self._known[key] = program
        return self._known[key]

    def _orders(self, name: str, n_microbatches: int) -> Orders:
        spec = self._spec
        if name == spec.schedule and spec.orders:
            return shortened(of_columns(spec.orders, spec.layout), n_microbatches)
        return of_part(name, spec.layout, n_microbatches, in_rounds=bool(self._in_lockstep))


@contextmanager
def fresh_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let the body compute gradients from None, then add what was there before."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, old in zip(parameters, before):
            if parameter.grad is None:
                parameter.grad = old
            elif old is not None:
                parameter.grad = old.add_(parameter.grad) if not old.requires_grad else old + parameter.grad


class InlineEngine:
    """All workers in this process, one instruction at a time: for debugging, tests and small models.

    The same programs, packets and stages as with processes; stages use the model's own parameters and modules,
    and replicas add into the same gradients.
    """

    def __init__(
        self, spec: PipelineSpec, model: nn.Module, loss_fn: Callable[..., Any] | None, options: Options
    ) -> None:
        self.n_threads = torch.get_num_threads()
        self.unsynced = Unsynced()  # never any: replicas add into the same gradients
        self.n_together = 1
        if synced_stages(spec.stages, spec.layout, options.stage.batchnorm):
            raise ConstraintError(
                "batchnorm='sync' lets replicas wait for each other, and launch='inline' runs them one after another",
                hint="launch='local', or one replica",
            )
        self._model = model
        self._programs = Programs(spec)
        self._devices = spec.devices
        self._random = spec.random
        fill_in(model, options.weights)
        mailbox: dict[MessageKey, torch.Tensor] = {}
        self._mailbox = mailbox
        self._executors: list[Executor] = []
        layout = self._layout = spec.layout
        for worker in range(layout.n_workers):
            own = [s for s, owners in enumerate(layout.workers) if worker in owners]
            device = torch.device(spec.devices[worker])
            stages = {s: StageRuntime(spec.stages[s], device, loss_fn, options.stage) for s in own}
            reducers: dict[int, Reducer] = {s: NoReduction() for s in own}
            look = options.stage.check_boundaries
            transport = InlineTransport(mailbox)
            self._executors.append(Executor(worker, layout, stages, transport, reducers, check_boundaries=look))

    def run(self, request: StepRequest) -> StepReport:
        """Carry out one request, always advancing the first worker that can move."""
        program = self._programs.get(self._programs.key_of(request))
        self._mailbox.clear()
        modes = modes_of(self._model)
        for executor in self._executors:
            for stage in executor.stages.values():
                stage.set_modes(modes)
        report = StepReport()
        trains = request.kind in (TRAIN, BACKWARD)
        with fresh_gradients(list(self._model.parameters()) if trains else []), isolated_randomness(self._random):
            for executor, instructions in zip(self._executors, program.workers):
                executor.begin(request, instructions)
            self._interleave()
            for executor in self._executors:
                report.merge(executor.end())
        self._update_statistics()
        return report

    def _update_statistics(self) -> None:
        """Let deferred BatchNorms move, once for all replicas: they share their modules."""
        for s, owners in enumerate(self._layout.workers):
            replicas = [self._executors[worker].stages[s] for worker in owners]
            seen = [row for row in (replica.take_statistics() for replica in replicas) if row is not None]
            if seen:
                replicas[0].update_statistics(seen)

    def _interleave(self) -> None:
        while True:
            able = [executor for executor in self._executors if not executor.finished and executor.ready()]
            if not able:
                break
            able[0].execute_next()
        stuck = [f"worker {e.worker} at {e.instructions[e.position]}" for e in self._executors if not e.finished]
        if stuck:
            raise StagecutError(f"inline execution cannot go on: {'; '.join(stuck)}")

    def forget(self, call: int) -> None:
        """Drop the activations of a forward whose backward will not come."""
        for executor in self._executors:
            executor.forget(call)

    def common_seed(self, seed: int) -> int:
        """Return ``seed``: one process draws it for all workers."""
        return seed

    def full_state(self) -> dict[str, torch.Tensor]:
        """Return the model's own state; it lives here."""
        return model_state(self._model)

    def gradient_norm(self, norm_type: float) -> torch.Tensor:
        """Return the norm of the model's own gradients; they live here."""
        return own_norm(self._model.parameters(), norm_type)

    def program_of(self, request: StepRequest) -> Program:
        """Return the program that a request runs."""
        return self._programs.get(self._programs.key_of(request))

    def positions(self) -> dict[int, int]:
        """Return where each worker is among its instructions."""
        return {executor.worker: executor.position for executor in self._executors}

    def residents(self) -> dict[int, Resident]:
        """Return this process for every worker."""
        return {worker: resident(device) for worker, device in enumerate(self._devices)}

    def gathered(self, text: str) -> list[str]:
        """Return the text: there is one process."""
        return [text]

    def close(self) -> None:
        """Drop the stages."""
        self._executors.clear()


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Return the mode (training or not) of every module, by every path that it has."""
    return {path: module.training for path, module in model.named_modules(remove_duplicate=False)}


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by every name that they have (tied ones under each)."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}
