"""Local worker processes: started by the parent, watched, and never left behind."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import weakref
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ..errors import WorkerLost
from .forking import Template, can_fork, settings
from .local_messages import Claim, Release
from .mailbox import Mailbox
from .pickling import dumps, loads
from .processes import STACK_SIGNAL, Child, is_stopped, peak_bytes, read_at_once, read_until_quiet, wait_for_exit
from .watch.logs import WORKERS

STOP_S = 3.0
STACK_S = 1.0
IDLE_S = 300.0  # after which a worker that no pipeline wants leaves
# Where files of packages lie that nobody edits and reloads; this package's may lie elsewhere, and torch's too.
_INSTALLED = (
    *(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
    os.path.dirname(torch.__file__),
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
)
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main(*map(int, sys.argv[2:]))"
)


@dataclass
class WorkerProcess:
    """One worker: its process, the socket to it, the pipe whose end tells it that the parent is gone, its stacks."""

    index: int
    process: Child
    connection: Connection
    channel: socket.socket
    lifeline: int
    stacks: int
    inherited_bytes: int  # the peak of memory that the system counts on from
    is_ready: bool = False
    owner: int = field(default_factory=os.getpid)
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)

    def may_import(self) -> None:
        """Note which of the user's files the worker may read from now on, and in which state."""
        self.modules = {**_files_outside(), **self.modules}

    @property
    def is_stale(self) -> bool:
        """Say whether a file that the worker may have imported is another one now: notebooks' users edit and reload."""
        return any(_state_of(path) != state for path, state in self.modules.items())

    def send_fd(self, fd: int) -> None:
        """Pass a file descriptor to the worker."""
        socket.send_fds(self.channel, [b"f"], [fd])

    def exit_error(self) -> WorkerLost:
        """Describe how the process ended."""
        most_bytes = wait_for_exit(self.process, STOP_S)
        code = self.process.returncode
        killed_by = -code if code is not None and code < 0 else None
        if code is None:
            how = "closed its connection, and has not exited"
        else:
            how = f"exit code {code}" if killed_by is None else f"killed by {_name_of(killed_by)}"
        WORKERS.warning("worker %d (pid %d) lost: %s", self.index, self.process.pid, how)
        lost = WorkerLost(
            f"worker {self.index} (pid {self.process.pid}) ended: {how}",
            hint="pm.restart() starts the workers again with the parameters as they are; "
            "a SIGKILL nobody sent is usually the kernel running out of memory",
            worker=self.index,
            pid=self.process.pid,
            signal=killed_by,
            exit_code=None if killed_by is not None else code,
            peak_bytes=None if most_bytes is None or most_bytes <= self.inherited_bytes else most_bytes,
        )
        crash = read_at_once(self.stacks)
        if crash:
            lost.add_note(f"worker {self.index}'s last words:\n{crash}")
        return lost

    def stack(self) -> str:
        """Ask the process where its threads are, and return the Python stacks; or why there are none."""
        if is_stopped(self.process.pid):
            return "its process is stopped (SIGSTOP, or a debugger)"
        read_at_once(self.stacks)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, STACK_SIGNAL)
        return read_until_quiet(self.stacks, STACK_S) or "its process does not answer signals"


class WorkerPool:
    """The worker processes of one pipeline.

    Workers import only stagecut: the user's ``__main__`` is never imported again, so no ``if __name__ == "__main__"``
    is needed, and notebooks work. They run in a session of their own, so Ctrl-C reaches the parent alone, which ends
    them. They are forked from one process that has imported what they need (template.py), which starts at once, or,
    where the system cannot do that, started one by one.
    """

    def __init__(self, n_workers: int, n_threads: int) -> None:
        self.n_threads = n_threads
        self.workers: list[WorkerProcess] = []
        self._n_workers = n_workers
        self._finalizer = weakref.finalize(self, _kill_all, self.workers)
        for index in range(n_workers):
            parked = _unparked()
            if parked is None:
                break
            WORKERS.info("worker %d: pid %d, which waited for a pipeline", index, parked.process.pid)
            self.workers.append(replace(parked, index=index))
        if len(self.workers) < n_workers and can_fork():
            _template()

    def keep(self, n_workers: int, n_threads: int) -> None:
        """Part with the workers that are not needed; the others are told at their setup how many threads to use."""
        spare, self.workers[n_workers:] = self.workers[n_workers:], []
        _park(spare)
        self.n_threads, self._n_workers = n_threads, n_workers

    def wait_until_ready(self, timeout_s: float) -> None:
        """Start the workers that are missing, and wait for every worker's first answer.

        Raises:
            WorkerLost: a worker ended, or was not ready in time.
        """
        while len(self.workers) < self._n_workers:
            self.workers.append(_start(len(self.workers), self.n_threads, timeout_s))
        for worker in self.workers:
            if worker.is_ready:
                continue
            if not worker.connection.poll(timeout_s):
                raise WorkerLost(f"worker {worker.index} was not ready after {timeout_s:.0f} s")
            self.receive(worker)
            worker.is_ready = True
            WORKERS.info("worker %d (pid %d) is ready", worker.index, worker.process.pid)

    def receive(self, worker: WorkerProcess, mailbox: Mailbox | None = None) -> Any:
        """Return the next answer of ``worker``, whose large tensors are in ``mailbox``.

        Raises:
            WorkerLost: the process has ended.
        """
        try:
            return loads(worker.connection.recv_bytes(), mailbox=mailbox)
        except (EOFError, ConnectionResetError) as error:
            raise worker.exit_error() from error

    def wait_any(self, workers: list[WorkerProcess], timeout_s: float) -> list[WorkerProcess]:
        """Wait until at least one of ``workers`` has answered or ended; empty after ``timeout_s``."""
        ready = set(wait([worker.connection for worker in workers], timeout_s))
        return [worker for worker in workers if worker.connection in ready]

    def close(self) -> None:
        """Let idle workers forget what they hold, and wait for the next pool that wants some."""
        idle, self.workers[:] = list(self.workers), []
        _park(idle)

    def kill(self) -> None:
        """End every worker at once."""
        self._finalizer()


_parked: list[WorkerProcess] = []
_templates: list[Template] = []
_forks = True


def _park(workers: list[WorkerProcess]) -> None:
    """Keep idle workers for the next pipeline: a process that has imported torch is worth a second."""
    _drop_foreign()
    for worker in workers:
        if worker.owner != os.getpid():
            continue  # it serves the process that this one was forked from
        try:
            if worker.is_ready:
                worker.connection.send_bytes(dumps(Release(IDLE_S)))
        except (OSError, ValueError):
            _kill_all([worker])
        else:
            _parked.append(worker)


def _unparked() -> WorkerProcess | None:
    """Take an idle worker that is still there, and has not imported what has changed since."""
    _drop_foreign()
    while _parked:
        worker = _parked.pop()
        unfit = worker.is_stale or worker.process.poll() is not None
        try:
            unfit = unfit or (worker.is_ready and worker.connection.poll())  # what it says now is that it has ended
            worker.connection.send_bytes(dumps(Claim()))
        except (OSError, ValueError):
            unfit = True
        if not unfit:
            return worker
        _kill_all([worker])
    return None


def _drop_foreign() -> None:
    """Forget workers of the process that this one was forked from."""
    _parked[:] = [worker for worker in _parked if worker.owner == os.getpid()]


def _files_outside() -> dict[str, tuple[int, int]]:
    """Return the state of the files of modules that were not installed, by path: workers import such modules too."""
    found = {}
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str) and not path.startswith(_INSTALLED):
            state = _state_of(path)
            if state is not None:
                found[path] = state
    return found


def _state_of(path: str) -> tuple[int, int] | None:
    """Return when a file was changed and how long it is; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def end_workers() -> None:
    """End the idle worker processes that wait for the next :func:`stagecut.compile`.

    They take memory (about what a Python process that has imported torch takes), and end with this process, or after
    five minutes without work.
    """
    _drop_foreign()
    _kill_all(_parked)
    while _templates:
        _templates.pop().close()


atexit.register(end_workers)


def _start(index: int, n_threads: int, timeout_s: float) -> WorkerProcess:
    ours, theirs = socket.socketpair()
    lifeline_read, lifeline_write = os.pipe()
    stacks_read, stacks_write = os.pipe()
    os.set_blocking(stacks_read, False)
    environment = _environment(n_threads)
    fds = [theirs.fileno(), lifeline_read, stacks_write]
    try:
        forked = _forked(fds, environment, n_threads, timeout_s)
        process, inherited_bytes = forked or _started(fds, environment, n_threads)
    finally:
        theirs.close()
        os.close(lifeline_read)
        os.close(stacks_write)
    WORKERS.info("worker %d started: pid %d", index, process.pid)
    return WorkerProcess(
        index, process, Connection(os.dup(ours.fileno())), ours, lifeline_write, stacks_read, inherited_bytes
    )


def _environment(n_threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(n_threads),
        "GLOO_SOCKET_IFNAME": _loopback(),
        # DDP's C++ side advises against find_unused_parameters, which exactness needs (see replicate.py).
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }


def _forked(fds: list[int], environment: dict[str, str], n_threads: int, timeout_s: float) -> tuple[Child, int] | None:
    """Fork a worker, and return it with the peak of memory that it begins with; None where that cannot be done."""
    global _forks
    if not (can_fork() and _forks):
        return None
    try:
        return _template().fork(fds, environment, n_threads, timeout_s), 0
    except OSError as error:
        WORKERS.warning("a worker is started by itself, which takes longer: %s", error)
        _forks = isinstance(error, (ProcessLookupError, TimeoutError))  # another one, or this one later, may do it
        return None


def _started(fds: list[int], environment: dict[str, str], n_threads: int) -> tuple[Child, int]:
    boot = _BOOT.format(module=f"{__package__}.worker")
    arguments = [json.dumps(sys.path), *map(str, fds), str(os.getpid()), str(n_threads)]
    process = subprocess.Popen(
        [sys.executable, "-c", boot, *arguments],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    return process, peak_bytes()


def _template() -> Template:
    """Return the process that workers are forked from, as it would start now; there is one at most."""
    boot = _BOOT.format(module=f"{__package__}.template")
    for template in list(_templates):
        if template.owner != os.getpid() or not template.is_alive or template.settings != settings(boot):
            _templates.remove(template)
            template.close()
    if not _templates:
        _templates.append(Template(boot, _environment(1)))
        WORKERS.info("workers will be forked from pid %d", _templates[0].pid)
    return _templates[0]


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])


def _kill_all(workers: list[WorkerProcess]) -> None:
    """End the processes and close what belongs to them; Ctrl-C meanwhile is heard when that is done."""
    interrupted: KeyboardInterrupt | None = None
    while workers:
        try:
            _end(workers)
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _end(workers: list[WorkerProcess]) -> None:
    """End the processes, those of another owner excepted: a forked child must not do it. It may be called again."""
    own = [worker for worker in workers if worker.owner == os.getpid()]
    for worker in own:
        if worker.process.poll() is None:
            worker.process.kill()
    for worker in own:
        worker.process.wait()
        worker.connection.close()
        worker.channel.close()
        for fd in (worker.lifeline, worker.stacks):
            with contextlib.suppress(OSError):
                os.close(fd)
        worker.lifeline = worker.stacks = -1
    workers.clear()
