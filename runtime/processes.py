"""What the system says of a child process: how it ended, whether it is stopped, what it last said."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol

STACK_SIGNAL = signal.SIGUSR2  # tells a worker to write its Python stacks
_QUIET_S = 0.1
_MOST_BYTES = 1 << 16


def peak_bytes() -> int:
    """Return the most memory that this process has had, or the one that started it had then."""
    return _bytes_of(resource.getrusage(resource.RUSAGE_SELF))


def _bytes_of(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024


class Child(Protocol):
    """A child process, as subprocess.Popen is one."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code."""

    def kill(self) -> None:
        """End it at once."""


def wait_for_exit(process: Child, timeout_s: float) -> int | None:
    """Wait for the end of a process, and return the most memory that it had; None if the system does not say.

    It is that of the process that started it, if that one had more (Linux counts on from there).

    ``process.returncode`` is set then, and None if it goes on after ``timeout_s``.
    """
    if process.returncode is not None or not ends_within(process, timeout_s):
        return None
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except ChildProcessError:  # it was waited for elsewhere
        process.poll()
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return _bytes_of(usage)


def ends_within(process: Child, timeout_s: float) -> bool:
    """Wait until a process has ended, without taking its exit status where the system allows that."""
    if not hasattr(os, "pidfd_open"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=timeout_s)
        return process.returncode is not None
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        return _readable(descriptor, timeout_s)
    finally:
        os.close(descriptor)


def _readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))


def is_stopped(pid: int) -> bool:
    """Say whether a process is stopped by a signal or a debugger, where the system says so (Linux)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state in "Tt"


def read_at_once(descriptor: int) -> str:
    """Return what lies in a pipe that does not block."""
    found = b""
    with contextlib.suppress(OSError):
        while len(found) < _MOST_BYTES and (part := os.read(descriptor, _MOST_BYTES)):
            found += part
    return found.decode(errors="replace")


def read_until_quiet(descriptor: int, timeout_s: float) -> str:
    """Return what comes from a pipe, which begins within ``timeout_s``; empty if nothing does."""
    found, wait_s = "", timeout_s
    while len(found) < _MOST_BYTES and _readable(descriptor, wait_s):
        part = read_at_once(descriptor)
        if not part:
            break
        found, wait_s = found + part, _QUIET_S
    return found
