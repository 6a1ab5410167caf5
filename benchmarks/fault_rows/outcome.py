"""What came of an injected fault: did it fire, what was seen and how soon, what was left, do numbers agree."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import stagecut


@dataclass
class Outcome:
    """One row of the table.

    Attributes:
        fired: how often the fault happened.
        seen: what the user saw.
        seconds: from the fault until then; None where there is nothing to wait for.
        goal_s: the most that it may take.
        left: processes, files, shared memory, descriptors and listening sockets that stayed.
        equal: whether all numbers are those of an undisturbed run; None where the fault leaves none.
    """

    fired: int
    seen: str
    seconds: float | None = None
    goal_s: float | None = None
    equal: bool | None = None
    left: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Say whether it is as promised."""
        late = self.seconds is not None and self.goal_s is not None and self.seconds > self.goal_s
        return self.fired > 0 and not late and not self.left and self.equal is not False


@dataclass(frozen=True)
class Row:
    """A fault and how to bring it about: ``run`` is given an empty folder."""

    fault: str
    run: Callable[[Path], Outcome]
    needs_root: bool = False


def carried_out(row: Row) -> Outcome:
    """Run a row in a folder of its own, and look for what it leaves."""
    stagecut.end_workers()
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        own, temporary = Path(folder, "own"), Path(folder, "temporary")
        own.mkdir()
        temporary.mkdir()
        tempfile.tempdir = str(temporary)  # other programs write to the one that all share
        try:
            before = _belongings()
            outcome = row.run(own)
            stagecut.end_workers()
            gc.collect()  # models hold the memory that they shared
            outcome.left = sorted(_belongings() - before)
        finally:
            tempfile.tempdir = None
    return outcome


def seconds_since(path: Path) -> float:
    """Return how long ago a file was touched."""
    return time.time() - path.stat().st_mtime


def _belongings() -> set[str]:
    own = psutil.Process()
    found = {f"process {p.pid}" for p in own.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}
    for folder in (tempfile.gettempdir(), "/dev/shm"):
        if os.path.isdir(folder):
            found |= {f"file {path}" for path in Path(folder).iterdir() if "stagecut" in path.name}
    found |= {f"descriptor of {link}" for link in _open_files()}
    sockets = own.net_connections() if hasattr(own, "net_connections") else own.connections()
    found |= {f"socket {s.laddr}" for s in sockets if s.status == psutil.CONN_LISTEN}
    return found


def _open_files() -> set[str]:
    """Name what this process has open of ours: memory that is shared, and pipes and sockets by their number."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if "stagecut" in link or link.startswith(("pipe:", "socket:")):
            found.add(link)
    return found
