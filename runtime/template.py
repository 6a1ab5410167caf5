"""The process that local workers are forked from: it has imported what they need, and has one thread.

Importing torch takes a second or more of a core, and what a first backward and the recording of a stage import of it
(SymPy, Dynamo) as much again; a fork of a process that has done so takes a few hundredths, and shares its memory. The
process runs no op, so that no thread pool and no CUDA context is there that a fork would break. A worker is a child
of the parent's, as one that the parent started itself: it is forked from a process in between that ends at once, and
the system gives it to the nearest process above that asked for such orphans (Linux: PR_SET_CHILD_SUBREAPER), which the
parent does while it waits here.
"""

from __future__ import annotations

import array
import gc
import importlib
import json
import os
import select
import socket
import struct
import sys
import time
import traceback
from pathlib import Path

PID = struct.Struct("=q")
READY = b"ready"
# What takes long, beside the workers' own module: torch imports these in a first backward, and when it traces.
_LATER = ("torch.fx.experimental.symbolic_shapes", "torch._dynamo", f"{__package__}.joint")
N_FDS = 6  # request, stdout, stderr, command, lifeline, stacks
_PARENT_POLL_S = 0.5
_ADOPTION_S = 10.0


def main(channel_fd: int, parent_pid: int) -> None:
    """Say that it is ready, or why it cannot be, and fork a worker for each request.

    It ends when the parent closes the channel, or is gone.
    """
    for name in (f"{__package__}.worker", *_LATER):  # here: the parent imports this module too, and needs none of them
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else a collection in a worker looks at, and so copies, all that is shared
    channel = socket.socket(fileno=channel_fd)
    try:
        channel.send(_obstacle() or READY)
    except BrokenPipeError:  # the parent wants none, or is gone
        os._exit(0)
    while True:
        readable, _, _ = select.select([channel], [], [], _PARENT_POLL_S)
        if os.getppid() != parent_pid:
            os._exit(0)
        if not readable:
            continue
        fds = _received(channel)
        if fds is None:
            os._exit(0)
        pid = _forked_away(channel, fds, parent_pid)
        for fd in fds:
            os.close(fd)
        channel.send(PID.pack(pid))


def _obstacle() -> bytes | None:
    """Say what a fork would break; the message is read on behind "the process that workers are forked from"."""
    if _n_threads() > 1:
        return b"has threads"
    trial = os.fork()
    if trial == 0:
        import torch

        os._exit(bool(torch.cuda._is_in_bad_fork()))
    return b"has asked CUDA for its devices" if os.waitpid(trial, 0)[1] else None


def _n_threads() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Threads:"):
            return int(line.split()[1])
    return 0


def _received(channel: socket.socket) -> list[int] | None:
    """Return the descriptors of a request; None at the end of the channel."""
    found = array.array("i")
    try:
        message, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_LEN(N_FDS * found.itemsize))
    except ConnectionResetError:  # the parent has closed it before it read all that it was told
        return None
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: N_FDS * found.itemsize])
    return list(found) if message else None


def _forked_away(channel: socket.socket, fds: list[int], parent_pid: int) -> int:
    """Fork a worker that is nobody's child here, and return its number."""
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        pid = os.fork()
        if pid:
            os.write(writing, PID.pack(pid))
            os._exit(0)
        try:
            for fd in (reading, writing, channel.detach()):
                os.close(fd)
            _become_worker(fds, parent_pid)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writing)
    answer = os.read(reading, PID.size)
    os.close(reading)
    os.waitpid(between, 0)
    return int(PID.unpack(answer)[0])


def _become_worker(fds: list[int], parent_pid: int) -> None:
    """Be as a process that the parent has started itself."""
    from .worker import main as serve

    request_fd, stdout, stderr, command, lifeline, stacks = fds
    with os.fdopen(request_fd, "rb") as file:
        file.seek(0)
        request = json.load(file)
    os.setsid()
    for fd, number in ((stdout, 1), (stderr, 2)):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.sched_setaffinity(0, request["cores"])
    sys.path[:] = request["path"]
    _wait_for_adoption(parent_pid)
    _draw_anew()
    serve(command, lifeline, stacks, parent_pid, request["n_threads"])


def _wait_for_adoption(parent_pid: int) -> None:
    end = time.monotonic() + _ADOPTION_S
    while os.getppid() != parent_pid:
        if time.monotonic() > end:
            os._exit(1)
        time.sleep(0.001)


def _draw_anew() -> None:
    """Let workers that draw from NumPy's global generator draw different numbers (Python's own is seeded by fork)."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
