"""The local engine: one process per worker, owned by this process, with all state in memory that they share."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import StageError, StallError
from .arena import Arena
from .batchnorm import replicas_of, synced_stages
from .engine import Programs, model_state
from .gradients import own_norm
from .launch import WorkerPool, WorkerProcess
from .local_messages import Failed, Forget, Run, Setup
from .mailbox import Mailbox
from .options import Options
from .pickling import dumps, loads
from .program import PipelineSpec, Program, StageSpec
from .requests import BACKWARD, TRAIN, StepReport, StepRequest
from .shared_gradients import gradient_slot
from .shared_memory import ChannelFiles, channels_of
from .surroundings import Surroundings
from .unsynced import Unsynced
from .watch import logs
from .watch.residents import Resident, resident
from .weights import materialised, names_of

START_S = 60.0
_POLL_S = 0.2


@dataclass(frozen=True)
class _Binding:
    """A tensor of the user's model and its home in the arena."""

    name: str
    tensor: torch.Tensor
    shared: torch.Tensor


class LocalEngine:
    """Run a pipeline on subprocesses of this one.

    The model's parameters and buffers move into shared memory, in place: they stay the same objects, any
    optimizer works on them, and workers see each update at once. Gradients come back through the same memory.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        pool: WorkerPool,
        timeout_s: float,
        options: Options,
    ) -> None:
        self.n_threads = pool.n_threads
        self.unsynced = Unsynced()
        self._spec = spec
        self._model = model
        self._pool = pool
        self._timeout_s = timeout_s
        self._options = options
        self._start_s = max(START_S, timeout_s)
        self._synced = synced_stages(spec.stages, spec.layout, options.stage.batchnorm)
        self.n_together = replicas_of(self._synced, spec.layout)
        self._programs = Programs(spec, self._synced)
        self._modules = list(model.named_modules(remove_duplicate=False))
        self._trainable: frozenset[str] | None = None
        self._modes: dict[str, bool] | None = None
        self._sent: set[tuple[str, int]] = set()
        self._names = {id(tensor): name for name, tensor in reversed(list(model_state(model).items()))}
        self._folder = tempfile.mkdtemp(prefix="stagecut-")
        self._mailboxes = [Mailbox() for _ in pool.workers]
        try:
            self._set_up(loss_fn)
        except BaseException:
            self.close(kill=True)
            raise
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _set_up(self, loss_fn: Callable[..., Any] | None) -> None:
        state = {self._names[id(tensor)]: tensor for tensor in model_state(self._model).values()}
        used = [self._tensors_of(worker) for worker in range(self._spec.layout.n_workers)]
        self._gradient_slots = {
            (worker, name): gradient_slot(worker, name)
            for worker, names in enumerate(used)
            for name in names
            if isinstance(state[name], nn.Parameter)
        }
        n_workers = self._spec.layout.n_workers
        tensors = [*state.items(), ("progress", torch.empty(n_workers, dtype=torch.int64))]
        tensors += [(slot, state[name]) for (_, name), slot in self._gradient_slots.items()]
        self._arena = Arena.create(tensors)
        self._progress = np.frombuffer(self._arena.view("progress").numpy(), dtype=np.int64)
        self._slot_views = {key: self._arena.view(slot) for key, slot in self._gradient_slots.items()}
        self._slot_pointers = {view.data_ptr() for view in self._slot_views.values()}
        self._bindings = [_Binding(name, tensor, self._arena.view(name)) for name, tensor in state.items()]
        self._fill()
        self._bind()
        self._pool.wait_until_ready(self._start_s)
        channels = [ChannelFiles.open(*pair) for pair in channels_of(self._spec.layout)]
        try:
            for worker in self._pool.workers:
                try:
                    self._send_setup(worker, used[worker.index], state, loss_fn)
                    for fd in (fd for channel in channels for fd in channel.of(worker.index) or ()):
                        worker.send_fd(fd)
                except BrokenPipeError as error:
                    raise worker.exit_error() from error
        finally:
            for channel in channels:
                channel.close()
        self._collect(list(self._pool.workers), self._start_s, None)

    def _tensors_of(self, worker: int) -> list[str]:
        names: dict[str, None] = {}
        for stage, owners in zip(self._spec.stages, self._spec.layout.workers):
            if worker in owners:
                tensors = [t for module in stage.modules.values() for t in (*module.parameters(), *module.buffers())]
                tensors += [t for t in stage.attributes.values() if isinstance(t, torch.Tensor)]
                names.update({self._names[id(t)]: None for t in tensors if id(t) in self._names})
        return list(names)

    def _fill(self) -> None:
        """Give tensors of the meta device their place in the arena, and their values."""
        names = names_of(self._model)
        for binding in self._bindings:
            if binding.tensor.is_meta:
                assert self._options.weights is not None
                self._options.weights.fill(names[id(binding.tensor)], binding.shared)
                materialised(binding.tensor, binding.shared)

    def _bind(self) -> None:
        """Make the arena the home of every parameter and buffer; repairs what the user replaced since last time."""
        for binding in self._bindings:
            tensor, shared = binding.tensor, binding.shared
            if tensor.data_ptr() == shared.data_ptr():
                continue
            if tensor.shape != shared.shape or tensor.dtype != shared.dtype:
                raise StageError(
                    f"{binding.name} was {shared.dtype} {tuple(shared.shape)} when the pipeline was compiled and is "
                    f"{tensor.dtype} {tuple(tensor.shape)} now",
                    hint="call stagecut.compile(...) again after changing the model",
                )
            shared.copy_(tensor.detach())
            tensor.data = shared

    def _send_setup(
        self, worker: WorkerProcess, used: list[str], state: dict[str, torch.Tensor], loss_fn: Callable[..., Any] | None
    ) -> None:
        layout = self._spec.layout
        stages = [stage for stage in self._spec.stages if worker.index in layout.workers[stage.index]]
        own_loss = loss_fn if any(stage.is_last for stage in stages) else None
        setup = Setup(
            worker=worker.index,
            layout=layout,
            device=self._spec.devices[worker.index],
            store_path=os.path.join(self._folder, "store"),
            arena_bytes=self._arena.n_bytes,
            slots=self._arena.slots,
            parameters=tuple(name for name in used if isinstance(state[name], nn.Parameter)),
            buffers=tuple(name for name in used if not isinstance(state[name], nn.Parameter)),
            gradients=tuple(name for w, name in self._gradient_slots if w == worker.index),
            payload=self._pickle(stages, own_loss),
            torchvision="torchvision" in sys.modules,
            n_threads=self.n_threads,
            options=self._options.stage,
            synced=self._synced,
            surroundings=Surroundings.here(),
            logs=os.environ.get(logs.VARIABLE, ""),
        )
        worker.may_import()
        worker.connection.send_bytes(dumps(setup))
        worker.send_fd(self._arena.fd)
        worker.send_fd(self._mailboxes[worker.index].fd)

    def _pickle(self, stages: list[StageSpec], loss_fn: Callable[..., Any] | None) -> bytes:
        try:
            return dumps((stages, loss_fn), self._names)
        except Exception as error:
            raise StageError(f"{self._culprit(stages, loss_fn)} cannot be sent to a worker: {error}") from error

    def _culprit(self, stages: list[StageSpec], loss_fn: Callable[..., Any] | None) -> str:
        """Find the module, or the loss function, that pickling stumbles over."""
        parts: list[tuple[str, Any]] = [("loss_fn", loss_fn)] + [
            (f"module {path!r}", m) for stage in stages for path, m in stage.modules.items()
        ]
        for name, part in parts:
            try:
                dumps(part, self._names)
            except Exception:
                return name
        return "a stage"

    def run(self, request: StepRequest) -> StepReport:
        """Carry out one request; on failure every worker is ended and the worker's own exception is raised."""
        trains = request.kind in (TRAIN, BACKWARD)
        goes_on = self.unsynced.resume() if trains else frozenset()
        self._bind()
        if trains:
            self._release_gradient_slots()
        key = self._programs.key_of(request)
        program = self._programs.get(key)
        trainable = frozenset(
            b.name for b in self._bindings if isinstance(b.tensor, nn.Parameter) and b.tensor.requires_grad
        )
        modes = {path: module.training for path, module in self._modules}
        news = (trainable if trainable != self._trainable else None, modes if modes != self._modes else None)
        self._trainable, self._modes = trainable, modes
        self._progress[:] = 0
        try:
            for worker in self._pool.workers:
                instructions = None if key in self._sent else program.workers[worker.index]
                own = self._share_of(request, worker.index)
                message = Run(key, instructions, own, *news, goes_on)
                worker.connection.send_bytes(dumps(message, mailbox=self._mailboxes[worker.index]))
            self._sent.add(key)
            done = self._collect(list(self._pool.workers), self._timeout_s, key)
        except BaseException:
            self.close(kill=True)
            raise
        report = StepReport()
        for answer in done.values():
            report.merge(answer.report)
        if trains:
            self._accept_gradients({worker: answer.has_gradient for worker, answer in done.items()}, request.sync)
        return report

    def _share_of(self, request: StepRequest, worker: int) -> StepRequest:
        """Leave out of a request what the worker has no use for."""
        layout = self._spec.layout
        own = [s for s, owners in enumerate(layout.workers) if worker in owners]
        needed = {name for s in own for name in self._spec.stages[s].graph_inputs}
        last = any(self._spec.stages[s].is_last for s in own)
        mine = [any(layout.worker_of(s, m) == worker for s in own) for m in range(request.n_microbatches)]
        inputs = tuple(
            {name: value for name, value in values.items() if name in needed} if is_mine else {}
            for values, is_mine in zip(request.inputs, mine)
        )
        fields = dict(request.__dict__, inputs=inputs)
        if not last:
            fields.update(targets=None, output_gradients=None)
        return StepRequest(**fields)

    def _collect(
        self, waiting: list[WorkerProcess], timeout_s: float, program: tuple[str, int] | None
    ) -> dict[int, Any]:
        """Wait for every worker's answer, as long as some worker makes progress."""
        answers: dict[int, Any] = {}
        bereft: Failed | None = None
        progress, since = self._progress.copy(), time.monotonic()
        while waiting:
            for worker in self._pool.wait_any(waiting, min(_POLL_S, timeout_s)):
                answer = self._pool.receive(worker, self._mailboxes[worker.index])
                waiting.remove(worker)
                if isinstance(answer, Failed) and answer.peer_gone:
                    bereft = answer  # the worker that ended is noticed too, and says how
                    continue
                if isinstance(answer, Failed):
                    raise self._original(answer)
                answers[worker.index] = answer
                since = time.monotonic()
            if not np.array_equal(progress, self._progress):
                progress, since = self._progress.copy(), time.monotonic()
            if waiting and time.monotonic() - since > timeout_s:
                raise self._stalled(waiting, timeout_s, program)
        if bereft is not None:
            raise self._original(bereft)
        return answers

    def _original(self, failed: Failed) -> BaseException:
        """Rebuild the exception that the worker raised, with the worker's traceback as a note."""
        error: BaseException | None = None
        if failed.error is not None:
            with contextlib.suppress(Exception):
                error = loads(failed.error)
        if not isinstance(error, BaseException):
            error = StageError(f"{failed.type_name}: {failed.message}")
            if failed.site is not None:
                error.add_note(f"stagecut: in {failed.site}")
        error.stagecut = failed.site  # type: ignore[attr-defined]
        error.add_note(f"worker's traceback:\n{failed.traceback}")
        return error

    def _stalled(self, waiting: list[WorkerProcess], timeout_s: float, key: tuple[str, int] | None) -> StallError:
        where = []
        for worker in waiting:
            if key is None:
                where.append(f"worker {worker.index} is still being set up")
                continue
            instructions = self._programs.get(key).workers[worker.index]
            position = min(int(self._progress[worker.index]), len(instructions) - 1)
            where.append(f"worker {worker.index} is at {instructions[position]}")
        return StallError(
            f"no worker made progress for {timeout_s:.0f} s: {'; '.join(where)}",
            hint="raise stagecut.compile(..., timeout_s=...) if one instruction may take that long",
        )

    def _release_gradient_slots(self) -> None:
        """Copy gradients that the user still holds in ``.grad`` out of the memory that this step will overwrite."""
        for binding in self._bindings:
            gradient = binding.tensor.grad
            if gradient is not None and gradient.data_ptr() in self._slot_pointers:
                binding.tensor.grad = gradient.clone()

    def _accept_gradients(self, has_gradient: dict[int, tuple[str, ...]], complete: bool) -> None:
        """Add what the workers computed to ``.grad``, summed where stages share a parameter; or hold parts of it."""
        parts: dict[str, list[torch.Tensor]] = {}
        for worker in sorted(has_gradient):
            for name in has_gradient[worker]:
                parts.setdefault(name, []).append(self._slot_views[worker, name])
        for binding in self._bindings:
            if binding.name not in parts:
                continue
            first, *others = parts[binding.name]
            if not complete:
                assert isinstance(binding.tensor, nn.Parameter)
                self.unsynced.hold(binding.name, binding.tensor, first)
                continue
            for other in others:
                _add(first, other)
            old = binding.tensor.grad
            binding.tensor.grad = first if old is None else old.add_(first)

    def forget(self, call: int) -> None:
        """Drop the activations of a forward whose backward will not come."""
        for worker in self._pool.workers:
            with contextlib.suppress(OSError, ValueError):
                worker.connection.send_bytes(dumps(Forget(call)))

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
        return dict(enumerate(self._progress.tolist()))

    def residents(self) -> dict[int, Resident]:
        """Return the workers' processes; none after they were ended."""
        return {w.index: resident(self._spec.devices[w.index], w.process.pid) for w in self._pool.workers}

    def gathered(self, text: str) -> list[str]:
        """Return the text: this process knows of all workers."""
        return [text]

    def close(self, *, kill: bool = False) -> None:
        """Let the workers go; with ``kill`` end them, whatever they do."""
        if kill:
            self._pool.kill()
        else:
            self._pool.close()
        for mailbox in self._mailboxes:
            mailbox.close()
        if hasattr(self, "_arena"):
            self._arena.close()


def _add(target: torch.Tensor, other: torch.Tensor) -> None:
    """Add as this thread, if NumPy knows the dtype: torch's threads would go on spinning on the workers' cores."""
    if target.dtype in (torch.float32, torch.float64):
        own = target.numpy()
        np.add(own, other.numpy(), out=own)
    else:
        target.add_(other)
