"""A local worker process: gets its stages over a private socket, runs steps, and leaves with its parent."""

from __future__ import annotations

import array
import contextlib
import faulthandler
import gc
import os
import select
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..heap import give_freed_memory_back, keep_freed_memory, return_freed_memory
from ..vision_compat import import_torchvision
from . import accelerators
from .arena import Arena, parameter_over
from .device_arena import DeviceArena
from .direct import DirectTransport, direct_pairs, groups_of
from .executor import Executor
from .explicit import STEPS_BEFORE
from .instructions import Instruction
from .local_messages import Claim, Done, Failed, Forget, Ready, Release, Run, Setup
from .mailbox import Mailbox
from .out_of_memory import is_out_of_memory
from .pickling import dumps, loads
from .processes import STACK_SIGNAL
from .replicate import NoReduction, Reducer
from .requests import BACKWARD, TRAIN
from .shared_gradients import CommonReducer, GradientSlots, SharedMemoryReducer, WithCommon, gradient_slot
from .shared_memory import Inbox, Outbox, PeerGone, SharedMemoryTransport, channels_of
from .stage import StageRuntime, settle_statistics
from .synced import rounds_of
from .watch import logs
from .watch.residents import resident

_PARENT_POLL_S = 0.5


def main(command_fd: int, lifeline_fd: int, stack_fd: int, parent_pid: int, n_threads: int) -> None:
    """Serve commands until the parent closes the connection, or is gone, or has wanted nothing for long.

    Python stacks go to ``stack_fd``: of a crash, and whenever the parent sends SIGUSR2.
    """
    os.set_blocking(stack_fd, False)
    faulthandler.enable(stack_fd)
    faulthandler.register(STACK_SIGNAL, stack_fd)
    threading.Thread(target=_follow_parent, args=(lifeline_fd, parent_pid), daemon=True).start()
    torch.set_num_threads(n_threads)
    connection = Connection(command_fd)
    connection.send_bytes(dumps(Ready()))
    server: _Server | None = None
    answer: Any = None
    idle_s: float | None = None
    while True:
        try:
            if idle_s is not None and not connection.poll(idle_s):
                break
            command = loads(connection.recv_bytes(), mailbox=None if server is None else server.mailbox)
        except EOFError:
            break
        idle_s = command.idle_s if isinstance(command, Release) else None
        if isinstance(command, Claim):
            continue
        if isinstance(command, Release):
            if server is not None:
                server.close()
            server = command = answer = None
            gc.collect()
            give_freed_memory_back()
            continue
        try:
            if isinstance(command, Setup):
                server = _Server(command, partial(_receive_fd, command_fd))
                answer = Ready()
            else:
                assert server is not None, "a worker is set up before it runs"
                answer = server.handle(command)
        except Exception as error:
            answer = _failure(error)
        if answer is not None:
            connection.send_bytes(dumps(answer, mailbox=None if server is None else server.mailbox))
    # No teardown of process groups: it would wait for peers that may be gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _follow_parent(lifeline_fd: int, parent_pid: int) -> None:
    """End this process when the parent ends, whatever the main thread is doing.

    The pipe closes with the parent; the parent's pid is looked at too, since a process that the parent forked may
    hold the other end open.
    """
    while True:
        readable, _, _ = select.select([lifeline_fd], [], [], _PARENT_POLL_S)
        if readable or os.getppid() != parent_pid:
            os._exit(1)


def _receive_fd(command_fd: int) -> int:
    with socket.socket(fileno=os.dup(command_fd)) as channel:
        fds = array.array("i")
        _, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_LEN(fds.itemsize))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: fds.itemsize])
            return fds[0]
    raise RuntimeError("the parent sent no memory descriptor")


def _failure(error: Exception) -> Failed:
    pickled = None
    with contextlib.suppress(Exception):
        pickled = dumps(error)
        loads(pickled)
    text = "".join(traceback.format_exception(error))
    site = getattr(error, "stagecut", None)
    used_bytes = resident("cpu").peak_memory_bytes if is_out_of_memory(error) else None
    return Failed(pickled, type(error).__name__, str(error), text, site, _lacks_a_peer(error), used_bytes)


def _lacks_a_peer(error: Exception) -> bool:
    """Say whether an error may only be that another worker is gone: gloo has words for it, and no type."""
    return isinstance(error, (PeerGone, dist.DistError)) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _transport(setup: Setup, next_fd: Callable[[], int]) -> SharedMemoryTransport:
    inboxes, outboxes = {}, {}
    for origin, target in channels_of(setup.layout):
        on_gpu = {worker: setup.devices[worker].startswith("cuda") for worker in (origin, target)}
        if setup.worker == origin:
            keeps = any(on_gpu.values())
            outboxes[target] = Outbox(next_fd(), next_fd(), pins=on_gpu[origin], keeps_pages=keeps)
        elif setup.worker == target:
            inboxes[origin] = Inbox(next_fd(), next_fd(), pins=on_gpu[target])
    return SharedMemoryTransport(setup.layout.worker_of, inboxes, outboxes)


class _Server:
    """The state of a worker between commands."""

    def __init__(self, setup: Setup, next_fd: Callable[[], int]) -> None:
        """Take the descriptors that follow ``setup`` from ``next_fd``."""
        self.setup = setup
        logs.configure(setup.logs, f"worker {setup.worker}")
        return_freed_memory()
        self._n_runs: Counter[str] = Counter()
        setup.surroundings.take_over()
        torch.set_num_threads(setup.n_threads)
        self.arena = Arena(next_fd(), setup.arena_bytes, setup.slots)
        self.mailbox = Mailbox(next_fd())
        near = _transport(setup, next_fd)
        memory = setup.device_memory
        self.place = self.arena if memory is None else DeviceArena.open(*memory)
        self.device = torch.device(setup.device)
        accelerators.use(self.device)
        if setup.torchvision:
            import_torchvision()
        self._fill()
        self.state: dict[str, torch.Tensor] = {name: parameter_over(self.place.view(name)) for name in setup.parameters}
        self.private_buffers = self._owns_private_buffers()
        for name in setup.buffers:
            view = self.place.view(name)
            self.state[name] = view.clone() if self.private_buffers else view
        specs, loss_fn = loads(setup.payload, self.state)
        self._meet_others()
        self.transport = DirectTransport(setup.worker, self.device, self.direct, near) if self.direct else near
        self.stages = {
            spec.index: StageRuntime(
                spec,
                self.device,
                loss_fn,
                setup.options,
                steady=True,
                rounds=self.rounds.get(spec.index),
            )
            for spec in specs
        }
        own = {name: self.place.view(gradient_slot(setup.worker, name)) for name in setup.gradients}
        self.gradients = GradientSlots({name: self.state[name] for name in own}, own)
        for stage in self.stages.values():
            stage.explicit.slots = {id(self.state[name]): slot for name, slot in own.items()}
        self._read_here = self._read_by_parent()
        self.programs: dict[tuple[str, int], tuple[Instruction, ...]] = {}
        self.executor = self._make_executor()
        logs.WORKERS.info("set up: stages %s on %s, %d threads", sorted(self.stages), setup.device, setup.n_threads)

    def _fill(self) -> None:
        """Give tensors of the meta device their values, and tell of each, so that nobody takes it for a stall."""
        if not self.setup.fills:
            return
        weights = loads(self.setup.weights)
        progress = self.arena.view("progress")
        for name, every_name in self.setup.fills:
            weights.fill(every_name, self.place.view(name))
            progress[self.setup.worker] += 1

    def _owns_private_buffers(self) -> bool:
        """Replicas change buffers side by side, so each works on its own copy; the first one's are kept.

        What an accelerator has is the worker's own already.
        """
        return self.setup.device_memory is None and self._has_replicated_buffers()

    def _has_replicated_buffers(self) -> bool:
        return bool(self.setup.buffers) and any(
            self.setup.worker in owners and len(owners) > 1 for owners in self.setup.layout.workers
        )

    def _meet_others(self) -> None:
        """Make the process groups of replicas, and of pairs of accelerators, as all workers do, in the same order."""
        layout, worker = self.setup.layout, self.setup.worker
        pairs, places = channels_of(layout), [("", device) for device in self.setup.devices]
        if layout.n_replicas > 1 or direct_pairs(pairs, places):
            store = dist.FileStore(self.setup.store_path, layout.n_workers)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=worker, world_size=layout.n_workers)
        self.direct = groups_of(pairs, places, lambda ranks, backend: dist.new_group(ranks, backend=backend))
        replicated = {s: owners for s, owners in enumerate(layout.workers) if len(owners) > 1}
        self.groups: dict[int, Any] = {
            s: dist.new_group(list(owners), backend="gloo") for s, owners in replicated.items()
        }
        self.rounds = {s: rounds_of(layout.workers[s], "gloo") for s in sorted(self.setup.synced)}

    def _make_executor(self) -> Executor:
        layout, worker = self.setup.layout, self.setup.worker
        self.common: dict[tuple[int, ...], CommonReducer] = {}
        summed = frozenset() if self.setup.with_accelerators else self.groups.keys()
        reducers: dict[int, Reducer] = {
            s: self._reducer(s, layout.workers[s], self.groups[s]) if s in summed else NoReduction()
            for s in self.stages
        }
        progress = np.frombuffer(self.arena.view("progress").numpy(), dtype=np.int64)

        def tick(position: int) -> None:
            progress[worker] = position

        coupled, look = bool(self.setup.synced), self.setup.options.check_boundaries
        stages, transport = self.stages, self.transport
        return Executor(worker, layout, stages, transport, reducers, tick, coupled=coupled, check_boundaries=look)

    def _reducer(self, s: int, owners: tuple[int, ...], group: Any) -> Reducer:
        """Sum what only this stage adds to when it is through, what others of this worker add to when all are."""
        known = {id(tensor): name for name, tensor in self.state.items()}
        users: dict[str, list[int]] = {}
        for index, stage in self.stages.items():
            for name in dict.fromkeys(known[id(parameter)] for parameter in stage.module.parameters()):
                users.setdefault(name, []).append(index)
        alone = [name for name, stages in users.items() if stages == [s]]
        common = []
        for stages in dict.fromkeys(tuple(found) for found in users.values() if s in found and len(found) > 1):
            if stages not in self.common:
                names = [name for name, found in users.items() if tuple(found) == stages]
                self.common[stages] = CommonReducer(self._summing(names, owners, group), len(stages))
            common.append(self.common[stages])
        own = self._summing(alone, owners, group)
        return WithCommon(own, common) if common else own

    def _summing(self, names: list[str], owners: tuple[int, ...], group: Any) -> SharedMemoryReducer:
        exchange = partial(dist.all_reduce, op=dist.ReduceOp.MAX, group=group)
        slots = [{name: self.arena.view(gradient_slot(owner, name)) for name in names} for owner in owners]
        return SharedMemoryReducer(self.gradients, names, slots, owners.index(self.setup.worker), exchange)

    def close(self) -> None:
        """Give up the files that are shared with the parent, and what connects replicas."""
        self.arena.close()
        self.mailbox.close()
        self.transport.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def handle(self, command: Run | Forget) -> Done | None:
        """Carry out one command."""
        if isinstance(command, Forget):
            self.executor.forget(command.call)
            return None
        if command.instructions is not None:
            self.programs[command.program] = command.instructions
        self._prepare(command)
        self.executor.begin(command.request, self.programs[command.program])
        report = self.executor.run()
        self._settle(command.request.kind)
        trains = command.request.kind in (TRAIN, BACKWARD)
        has_gradient = self._complete_gradients() if trains else ()
        parts = self.gradients.written() if trains and not command.request.sync else ()
        settle_statistics(self.stages, self._gathered)
        self._hand_over_buffers()
        if self.setup.device_memory is None:
            return Done(report, has_gradient, parts)
        accelerators.synchronize([self.device])
        return Done(report, has_gradient, parts, resident(self.setup.device))

    def _settle(self, kind: str) -> None:
        """Keep what steps free once they are recorded, if ever: from now on they allocate the same over and over."""
        self._n_runs[kind] += 1
        if self._n_runs[kind] == STEPS_BEFORE + 1:
            give_freed_memory_back()
            keep_freed_memory()

    def _prepare(self, command: Run) -> None:
        if command.request.kind in (TRAIN, BACKWARD):
            for name in self.setup.parameters:
                if name not in command.goes_on:
                    self.state[name].grad = None
                elif not self.gradients.has(name):
                    self.gradients.take(name)  # it is what a worker had whose place this one took
        if command.trainable is not None:
            for name in self.setup.parameters:
                self.state[name].requires_grad_(name in command.trainable)
        if self.private_buffers:
            for name in self.setup.buffers:
                own, common = self.state[name], self.arena.view(name)
                if not torch.equal(own, common):  # a backward to come may need it: autograd would take it for another
                    own.copy_(common)
        if self._has_replicated_buffers():  # which the first replica writes to when all have read them
            for s in sorted(self.groups.keys() & self.stages.keys()):
                dist.barrier(self.groups[s])
        if command.modes is not None:
            for stage in self.stages.values():
                stage.set_modes(command.modes)

    def _complete_gradients(self) -> tuple[str, ...]:
        """Name the gradients that the parent reads here: those of stages whose first replica this worker is."""
        if self.setup.with_accelerators:
            return self.gradients.written()
        return tuple(name for name in self.gradients.written() if name in self._read_here)

    def _read_by_parent(self) -> frozenset[str]:
        layout = self.setup.layout
        first = [stage for s, stage in self.stages.items() if layout.workers[s][0] == self.setup.worker]
        read = {id(parameter) for stage in first for parameter in stage.module.parameters()}
        return frozenset(name for name in self.setup.parameters if id(self.state[name]) in read)

    def _gathered(self, stage: int, row: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of all replicas of a stage of this worker."""
        if stage not in self.groups:
            return [row]
        own = row.cpu()
        rows = [torch.empty_like(own) for _ in self.setup.layout.workers[stage]]
        dist.all_gather(rows, own, group=self.groups[stage])
        return [other.to(row.device) for other in rows]

    def _hand_over_buffers(self) -> None:
        first = any(owners[0] == self.setup.worker for owners in self.setup.layout.workers)
        if self.private_buffers and first:
            for name in self.setup.buffers:
                self.arena.view(name).copy_(self.state[name])
