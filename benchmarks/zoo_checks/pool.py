"""Run examinations in processes of their own: one that crashes or hangs costs its own record only."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from zoo_entries import Entry

from .examine import examine_into

# Of models with more parameters, one at a time is in memory.
LARGE = 100_000_000
# Limits are processor time; a process that does not get on in so many times as long on the clock hangs.
_PATIENCE = 8
# Bytes of address space that a process may take.
_MEMORY, _MEMORY_LARGE = 10 << 30, 20 << 30


@dataclass
class _Running:
    entry: Entry
    method: str
    process: Any
    path: Path
    start: float
    limit_s: float


def run_all(
    tasks: Iterable[tuple[Entry, str]],
    *,
    workers: int,
    limit_s: float,
    folder: Path,
    done: Callable[[Entry, str, dict[str, Any]], None],
) -> None:
    """Examine every entry by its method, ``workers`` at once, and report each record as soon as it is there."""
    context = _context()
    waiting = list(tasks)
    running: list[_Running] = []
    try:
        while waiting or running:
            while len(running) < workers and (task := _next(waiting, running)) is not None:
                running.append(_start(context, *task, folder, limit_s))
            wait([item.process.sentinel for item in running], timeout=0.5)
            for item in list(running):
                late = time.monotonic() - item.start > _PATIENCE * item.limit_s
                if item.process.is_alive() and not late:
                    continue
                record = _finish(item, late=late)
                running.remove(item)
                done(item.entry, item.method, record)
    finally:
        for item in running:
            item.process.kill()


def _context() -> Any:
    here = str(Path(__file__).resolve().parents[1])
    # The server of the forked processes takes its search path from the environment.
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    if here not in sys.path:
        sys.path.insert(0, here)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo_checks.preload"])
    return context


def _next(waiting: list[tuple[Entry, str]], running: list[_Running]) -> tuple[Entry, str] | None:
    crowded = any(item.entry.n_parameters > LARGE for item in running)
    for index, (entry, _) in enumerate(waiting):
        if not (crowded and entry.n_parameters > LARGE):
            return waiting.pop(index)
    return None


def _start(context: Any, entry: Entry, method: str, folder: Path, limit_s: float) -> _Running:
    path = folder / f"{entry.group}-{entry.name.replace('/', '_')}-{method}.json"
    path.unlink(missing_ok=True)
    memory = _MEMORY_LARGE if entry.n_parameters > LARGE else _MEMORY
    own_limit_s = limit_s * (3 if entry.n_parameters > LARGE else 1)
    arguments = (entry.group, entry.name, method, str(path), own_limit_s, memory)
    process = context.Process(target=examine_into, args=arguments, daemon=True)
    process.start()
    return _Running(entry, method, process, path, time.monotonic(), own_limit_s)


def _finish(item: _Running, *, late: bool) -> dict[str, Any]:
    if late:
        item.process.kill()
    item.process.join()
    late = late or item.process.exitcode == -signal.SIGXCPU
    record: dict[str, Any] = json.loads(item.path.read_text()) if item.path.exists() else {"kind": "crashed"}
    record["wall_s"] = time.monotonic() - item.start
    if late:
        record.update(stopped=f"after {item.limit_s:.0f} s of processor time")
    elif item.process.exitcode:
        log = Path(f"{item.path}.log")
        tail = log.read_text()[-500:] if log.exists() else ""
        record.update(stopped=f"exit status {item.process.exitcode} {tail}".strip())
    if "stopped" in record and "checks" not in record:
        record["kind"] = "late" if late else "crashed"
        record.setdefault("error", record["stopped"])
    return record
