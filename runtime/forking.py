"""Workers by fork: the parent's side of the process that they are forked from (template.py)."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

from .arena import anonymous_file
from .processes import ends_within
from .template import N_FDS, PID, READY

_GET_CHILD_SUBREAPER, _SET_CHILD_SUBREAPER = 37, 36  # prctl(2)
# What is read from the environment when Python, torch or NumPy is loaded; all else a fork can be given.
_AT_IMPORT = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "NPY_", "TORCH", "PYTORCH", "ATEN_"),
    *("CUDA_", "NVIDIA_", "HIP_", "TRITON_", "PYTHON", "LD_", "GLIBC_", "MALLOC_"),
)
_SET_BY_TORCH = "TORCHINDUCTOR_CACHE_DIR"  # when Dynamo is imported, and read when it is needed


class ForkedProcess:
    """A worker that was forked for this process, and is its child: the part of subprocess.Popen that is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # it was waited for elsewhere, which knows how it ended
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it did not end in time.
        """
        while self.poll() is None:
            if not ends_within(self, 3600.0 if timeout is None else timeout) and timeout is not None:
                raise subprocess.TimeoutExpired("a worker", timeout)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Template:
    """The process that workers are forked from, started by the first to need it."""

    def __init__(self, boot: str, environment: dict[str, str]) -> None:
        """Start it; it imports what workers need meanwhile. ``boot`` is Python that ends in template.main.

        ``environment`` says one thread: a fork would leave those of a pool behind.
        """
        self.owner = os.getpid()
        self.settings = settings(boot)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-c", boot, *arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**environment, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            start_new_session=True,
        )
        theirs.close()
        self._channel = ours
        self._answer: bytes | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Return the number of its process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Say whether it may fork, or may be able to soon."""
        return self._process.poll() is None

    def fork(self, fds: list[int], environment: dict[str, str], n_threads: int, timeout_s: float) -> ForkedProcess:
        """Fork a worker with these descriptors, once the process is ready.

        Raises:
            ProcessLookupError: it has ended.
            TimeoutError: it was not ready in time.
            OSError: it cannot: it has threads, or the system gives its children to another process.
        """
        request = {
            "environment": environment,
            "folder": os.getcwd(),
            "cores": sorted(os.sched_getaffinity(0)),
            "path": sys.path,
            "n_threads": n_threads,
        }
        with self._lock:
            self._wait_until_ready(timeout_s)
            file = anonymous_file("request")
            try:
                os.write(file, json.dumps(request).encode())
                given = [file, 1, 2, *fds]
                assert len(given) == N_FDS
                with _taking_orphans():
                    socket.send_fds(self._channel, [b"f"], given)
                    pid = PID.unpack(self._heard(PID.size))[0]
            except BaseException:
                self.close()  # an answer that nobody heard would be taken for that to the next request
                raise
            finally:
                os.close(file)
        process = ForkedProcess(pid)
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError as error:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise OSError(f"the worker that was forked (pid {pid}) is another process's child") from error
        return process

    def _wait_until_ready(self, timeout_s: float) -> None:
        if self._answer is None:
            self._channel.settimeout(timeout_s)
            self._answer = self._heard(256)
        if self._answer != READY:
            raise OSError(f"the process that workers are forked from {self._answer.decode()}")

    def _heard(self, n_bytes: int) -> bytes:
        try:
            found = self._channel.recv(n_bytes)
        except TimeoutError as error:
            raise TimeoutError("the process that workers are forked from was not ready in time") from error
        if not found:
            raise ProcessLookupError("the process that workers are forked from has ended")
        return found

    def close(self) -> None:
        """End it, unless it serves the process that this one was forked from."""
        self._channel.close()
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()


def settings(boot: str) -> tuple[object, ...]:
    """Return what a forked worker takes over from the start of the process that it was forked from."""
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(_AT_IMPORT) and name != _SET_BY_TORCH
    }
    return boot, sys.executable, tuple(sorted(environment.items()))


@contextlib.contextmanager
def _taking_orphans() -> Iterator[None]:
    """Let orphans among this process's descendants become its children for the while."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    if libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the system gives no orphans to this process")
    try:
        yield
    finally:
        libc.prctl(_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def can_fork() -> bool:
    """Say whether the system has what this takes."""
    return sys.platform.startswith("linux")
