"""Faults around processes: Ctrl-C, a parent that is killed, forks, several pipelines, a small /dev/shm."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from .injector import Injector
from .outcome import Outcome, Row
from .steps import compiled, equal, trained

SCRIPT = str(Path(__file__).with_name("script.py"))
_WAIT_S = 120.0


def started(what: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Run the script."""
    command = [*before, sys.executable, SCRIPT, what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Read the line with the workers of the script."""
    assert process.stdout is not None
    return [int(pid) for pid in process.stdout.readline().split()]


def _readable(descriptor: int) -> bool:
    """Wait for the end of a process: it is the system that says so, whoever its parent is by then."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(_WAIT_S * 1e3))


def signalled(signals: Sequence[signal.Signals], goal_s: float) -> Callable[[Path], Outcome]:
    """Make a row in which the parent gets signals in the middle of a step; seconds are until no worker is left."""

    def run(folder: Path) -> Outcome:
        with started("hang") as process:
            workers = [os.pidfd_open(pid) for pid in workers_of(process)]
            assert process.stdout is not None
            process.stdout.readline()
            fired = int(process.stdout.readline() == "inside\n")
            begin = time.monotonic()
            for number in signals:
                process.send_signal(number)
            ended = [_readable(worker) for worker in workers]
            seconds = time.monotonic() - begin
            for worker in workers:
                os.close(worker)
            _, errors = process.communicate(timeout=_WAIT_S)
        interrupted = "KeyboardInterrupt" in errors
        seen = "KeyboardInterrupt" if interrupted else signal.Signals(-process.returncode).name
        return Outcome(
            fired if all(ended) and (signals[0] != signal.SIGINT or interrupted) else 0, seen, seconds, goal_s
        )

    return run


def forked(folder: Path) -> Outcome:
    """Use the pipeline in a forked child, then in the parent."""
    with started("fork") as process:
        begin = time.monotonic()
        printed, errors = process.communicate(timeout=_WAIT_S)
    lines = printed.splitlines()
    child = next((line for line in lines if line.startswith("child: ")), errors)
    refused = "was forked from process" in child and "\n" not in child
    trains = any(line.startswith("parent: ") for line in lines)
    return Outcome(int(refused and trains), "StagecutError, one line", time.monotonic() - begin, None, trains)


def side_by_side(folder: Path) -> Outcome:
    """Train two pipelines of this process in turn, beside two runs of the script; nobody listens on a port."""

    def seen(error: Exception) -> None:
        raise error

    with compiled(Injector("none", folder, times=0)) as pm:
        wanted = trained(pm, seen)
    with started("leave") as one, started("steps") as two:
        with (
            compiled(Injector("none", folder, times=0)) as first,
            compiled(Injector("none", folder, times=0)) as second,
        ):
            listening = [s for p in psutil.Process().children() for s in _listening(p)]
            same = equal(trained(first, seen), wanted) and equal(trained(second, seen), wanted)
        losses = {process.communicate(timeout=_WAIT_S)[0].splitlines()[1] for process in (one, two)}
    return Outcome(int(not listening), "nothing", equal=same and len(losses) == 1)


def _listening(process: psutil.Process) -> list[object]:
    try:
        sockets = process.net_connections()
    except psutil.NoSuchProcess:
        return []
    return [s for s in sockets if s.status == psutil.CONN_LISTEN]


def little_shared_memory(folder: Path) -> Outcome:
    """Run where /dev/shm has room for nothing."""
    with started("steps") as process:
        wanted = process.communicate(timeout=_WAIT_S)[0].splitlines()[1]
    mount = 'mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec "$@"'
    with started("steps", ["unshare", "--mount", "sh", "-c", mount, "sh"]) as process:
        printed, errors = process.communicate(timeout=_WAIT_S)
    lines = printed.splitlines()
    return Outcome(1, "nothing" if len(lines) == 2 else errors, equal=lines[1:] == [wanted])


ROWS = [
    Row("Ctrl-C in a step", signalled([signal.SIGINT], 3.0)),
    Row("Ctrl-C twice", signalled([signal.SIGINT, signal.SIGINT], 3.0)),
    Row("parent killed (SIGKILL)", signalled([signal.SIGKILL], 2.0)),
    Row("parent ended (SIGTERM)", signalled([signal.SIGTERM], 2.0)),
    Row("fork after compile", forked),
    Row("two pipelines in a process, two runs", side_by_side),
    Row("/dev/shm full", little_shared_memory, needs_root=True),
]
