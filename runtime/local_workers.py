"""The processes of one pipeline on this machine: set up, given requests, and watched until each has answered."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..errors import StageError, StallError, Waiting, WorkerLost
from . import accelerators
from .deadlines import Deadlines
from .launch import WorkerPool, WorkerProcess
from .local_messages import Done, Failed, Forget, Run, Setup
from .mailbox import Mailbox
from .options import Options
from .out_of_memory import explained, set_against
from .pickling import dumps, loads
from .program import PipelineSpec, Program, StageSpec
from .requests import StepRequest
from .shared_memory import ChannelFiles, channels_of
from .shared_model import SharedModel
from .surroundings import Surroundings
from .waiting import at_position, waiting
from .watch import logs

_POLL_S = 0.2
_BEREFT_S = 5.0  # for a lost process to be noticed, once another says that it is alone


@dataclass(frozen=True)
class Conditions:
    """How the user's model stands: what requires gradients, and the training flag of each module."""

    trainable: frozenset[str]
    modes: dict[str, bool]


class LocalWorkers:
    """The workers of one pipeline, from their setup until one of them is lost or they are let go."""

    def __init__(
        self,
        spec: PipelineSpec,
        shared: SharedModel,
        loss_fn: Callable[..., Any] | None,
        pool: WorkerPool,
        deadlines: Deadlines,
        options: Options,
        synced: frozenset[int],
    ) -> None:
        self.pool = pool
        self._spec = spec
        self._shared = shared
        self._deadlines = deadlines
        self._options = options
        self._synced = synced
        self._conditions: Conditions | None = None
        self._sent: set[tuple[str, int]] = set()
        self._mailboxes = [Mailbox() for _ in range(spec.layout.n_workers)]
        self._running: tuple[Program, StepRequest] | None = None
        folder = tempfile.mkdtemp(prefix="stagecut-")
        try:
            self._set_up(loss_fn, os.path.join(folder, "store"))
        except BaseException:
            self.close(kill=True)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _set_up(self, loss_fn: Callable[..., Any] | None, store: str) -> None:
        self.pool.wait_until_ready(self._deadlines.start_s)
        channels = [ChannelFiles.open(*pair) for pair in channels_of(self._spec.layout)]
        try:
            for worker in self.pool.workers:
                with self._if_it_lives(worker):
                    self._send_setup(worker, loss_fn, store)
                    for fd in (fd for channel in channels for fd in channel.of(worker.index) or ()):
                        worker.send_fd(fd)
        finally:
            for channel in channels:
                channel.close()
        self._collect(self._deadlines.start_s)

    @contextlib.contextmanager
    def _if_it_lives(self, worker: WorkerProcess) -> Any:
        """Let what is sent to a worker fail as the loss of it."""
        try:
            yield
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._located(worker.exit_error()) from error

    def _send_setup(self, worker: WorkerProcess, loss_fn: Callable[..., Any] | None, store: str) -> None:
        layout, shared = self._spec.layout, self._shared
        stages = [stage for stage in self._spec.stages if worker.index in layout.workers[stage.index]]
        own_loss = loss_fn if any(stage.is_last for stage in stages) else None
        used, own_arena = shared.used[worker.index], shared.device_arenas.get(worker.index)
        fills = tuple(shared.fills.get(worker.index, ()))
        setup = Setup(
            worker=worker.index,
            layout=layout,
            devices=self._spec.devices,
            store_path=store,
            arena_bytes=shared.arena.n_bytes,
            slots=shared.arena.slots,
            parameters=tuple(name for name in used if shared.is_parameter(name)),
            buffers=tuple(name for name in used if not shared.is_parameter(name)),
            gradients=shared.gradient_names(worker.index),
            device_memory=None if own_arena is None else (own_arena.opener(), own_arena.slots),
            fills=fills,
            weights=self._pickled_weights(fills),
            payload=self._pickle(stages, own_loss),
            torchvision="torchvision" in sys.modules,
            n_threads=self.pool.n_threads,
            options=self._options.stage,
            synced=self._synced,
            surroundings=Surroundings.here(),
            logs=os.environ.get(logs.VARIABLE, ""),
        )
        worker.may_import()
        worker.connection.send_bytes(dumps(setup))
        worker.send_fd(shared.arena.fd)
        worker.send_fd(self._mailboxes[worker.index].fd)

    def _pickled_weights(self, fills: tuple[tuple[str, list[str]], ...]) -> bytes:
        if not fills:
            return b""
        assert self._options.weights is not None, "compile has seen to it"
        try:
            return dumps(self._options.weights.part(name for _, names in fills for name in names))
        except Exception as error:
            raise StageError(f"what initialises {fills[0][0]} cannot be sent to a worker: {error}") from error

    def _pickle(self, stages: list[StageSpec], loss_fn: Callable[..., Any] | None) -> bytes:
        try:
            return dumps((stages, loss_fn), self._shared.names)
        except Exception as error:
            raise StageError(f"{self._culprit(stages, loss_fn)} cannot be sent to a worker: {error}") from error

    def _culprit(self, stages: list[StageSpec], loss_fn: Callable[..., Any] | None) -> str:
        """Find the module, or the loss function, that pickling stumbles over."""
        parts: list[tuple[str, Any]] = [("loss_fn", loss_fn)] + [
            (f"module {path!r}", m) for stage in stages for path, m in stage.modules.items()
        ]
        for name, part in parts:
            try:
                dumps(part, self._shared.names)
            except Exception:
                return f"{name}{_attribute_of(part, lambda value: dumps(value, self._shared.names))}"
        return "a stage"

    def run(
        self,
        request: StepRequest,
        key: tuple[str, int],
        program: Program,
        conditions: Conditions,
        goes_on: dict[int, tuple[str, ...]],
    ) -> dict[int, Done]:
        """Carry out one request; on failure every worker is ended, and the worker's own exception is raised.

        Args:
            request: what is asked for.
            key: names ``program``, which workers know by it once they were sent it.
            program: what each of them does.
            conditions: how the model stands.
            goes_on: per worker, the parameters whose gradients are added to those of the step before.

        Raises:
            WorkerLost: a process ended.
            StallError: nothing moved for as long as the deadline says.
        """
        old, self._conditions = self._conditions, conditions
        trainable = conditions.trainable if old is None or conditions.trainable != old.trainable else None
        modes = conditions.modes if old is None or conditions.modes != old.modes else None
        self._shared.progress[:] = 0
        self._running = program, request
        begin = time.monotonic()
        accelerators.synchronize(self._shared.accelerators)
        try:
            for worker in self.pool.workers:
                instructions = None if key in self._sent else program.workers[worker.index]
                own = self._share_of(request, worker.index)
                message = Run(key, instructions, own, trainable, modes, goes_on.get(worker.index, ()))
                with self._if_it_lives(worker):
                    worker.connection.send_bytes(dumps(message, mailbox=self._mailboxes[worker.index]))
            self._sent.add(key)
            done = self._collect(self._deadlines.of(key))
        except BaseException:
            self.pool.kill()
            raise
        self._running = None
        self._deadlines.note(key, time.monotonic() - begin)
        return done

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

    def _collect(self, timeout_s: float) -> dict[int, Any]:
        """Wait for every worker's answer, as long as some worker makes progress."""
        left = list(self.pool.workers)
        answers: dict[int, Any] = {}
        bereft: Failed | None = None
        progress, since = self._shared.progress.copy(), time.monotonic()
        while left:
            for worker in self.pool.wait_any(left, min(_POLL_S, timeout_s)):
                try:
                    answer = self.pool.receive(worker, self._mailboxes[worker.index])
                except WorkerLost as lost:
                    raise self._located(lost)  # noqa: B904 - it is the same error, with more to it
                left.remove(worker)
                since = time.monotonic()
                if isinstance(answer, Failed) and answer.peer_gone:
                    bereft = answer  # the worker that ended is noticed too, and says how
                elif isinstance(answer, Failed):
                    raise self._original(answer)
                else:
                    answers[worker.index] = answer
            if not np.array_equal(progress, self._shared.progress):
                progress, since = self._shared.progress.copy(), time.monotonic()
            quiet_s = time.monotonic() - since
            if left and bereft is not None and quiet_s > _BEREFT_S:
                break
            if left and quiet_s > timeout_s:
                raise self._stalled(left, timeout_s)
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
        if failed.used_bytes is not None and failed.site is not None:
            error = explained(error, failed.site, self._planned_bytes(failed.site.worker), failed.used_bytes)
        error.add_note(f"worker's traceback:\n{failed.traceback}")
        return error

    def _planned_bytes(self, worker: int) -> int:
        planned = self._spec.worker_bytes
        return planned[worker] if worker < len(planned) else 0

    def _located(self, lost: WorkerLost) -> WorkerLost:
        """Add to the loss of a worker where in its program it was."""
        if lost.worker is None:
            return lost
        if self._running is None:
            stages = [s for s, owners in enumerate(self._spec.layout.workers) if lost.worker in owners]
            lost.stage = stages[0] if len(stages) == 1 else None
            where = f"with stage {', '.join(map(str, stages))}, outside of a step"
        else:
            program, request = self._running
            at = at_position(program.workers[lost.worker], int(self._shared.progress[lost.worker]))
            lost.step = request.step
            if at is not None:
                owners = self._spec.layout.workers[at.stage]
                lost.stage, lost.replica = at.stage, owners.index(lost.worker)
                lost.microbatch = at.microbatch if at.microbatch >= 0 else None
            where = f"in step {request.step}, at {at}" if at is not None else f"at the end of step {request.step}"
        lost.message = f"{lost.message}, {where}"
        planned = self._planned_bytes(lost.worker)
        if lost.peak_bytes is not None and planned:
            lost.message += f"; at its fullest it had {set_against(lost.peak_bytes, planned)}"
        if lost.signal == signal.SIGKILL and planned:
            lost.hint = f"{lost.hint}: stagecut.compile(..., memory_bytes={planned // 2}) plans for half of it"
        return lost

    def _stalled(self, left: list[WorkerProcess], timeout_s: float) -> StallError:
        if self._running is None:
            which = ", ".join(str(worker.index) for worker in left)
            return StallError(
                f"worker {which} was not set up after {timeout_s:.0f} s",
                hint="stagecut.compile(..., timeout_s=...) if stages take that long to make",
            )
        program, request = self._running
        every = waiting(program, self._spec.layout, self._shared.progress.tolist())
        found = [_with_stack(every[worker.index], worker) for worker in left]
        error = StallError(
            f"no worker made progress for {timeout_s:.0f} s in step {request.step}: {'; '.join(map(str, found))}",
            hint="raise stagecut.compile(..., timeout_s=...) if one instruction may take that long",
        )
        error.step, error.waiting = request.step, tuple(found)
        for one in found:
            error.add_note(f"worker {one.worker}: {one.stack}")
        return error

    def forget(self, call: int) -> None:
        """Drop the activations of a forward whose backward will not come."""
        for worker in self.pool.workers:
            with contextlib.suppress(OSError, ValueError):
                worker.connection.send_bytes(dumps(Forget(call)))

    def close(self, *, kill: bool = False) -> None:
        """Let the workers go; with ``kill`` end them, whatever they do."""
        if kill:
            self.pool.kill()
        else:
            self.pool.close()
        for mailbox in self._mailboxes:
            mailbox.close()


def _with_stack(waits: Waiting, worker: WorkerProcess) -> Waiting:
    return Waiting(waits.worker, waits.instruction, waits.waits_for, worker.stack())


def _attribute_of(part: Any, send: Callable[[Any], object]) -> str:
    """Find the attribute, as a path behind ``part``, that cannot be sent; empty if it is the whole."""
    if not isinstance(part, nn.Module):
        return ""
    for path, module in part.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                send(value)
            except Exception:
                return f", attribute {'.'.join(filter(None, (path, name)))!r} ({type(value).__name__}),"
    return ""
