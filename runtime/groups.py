"""Process groups whose ranks wait for each other as long as they were told to, and no longer."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..errors import StagecutError, StallError, WorkerLost
from .joining import store_of_agents
from .shared_memory import PeerGone

# Ranks start one after the other, and import what they need: they are waited for so long at least.
JOIN_S = 60.0
_OF_GLOO = re.compile(r"gloo/|Gloo|gloo::")
_OUT_OF_TIME = re.compile(r"[Tt]imed out|[Tt]imeout")
_GROUPS: dict[float, Any] = {}
_WORLD: list[Any] = [None]


class Holder(Protocol):
    """What holds process groups until it is closed; closed again, it does nothing."""

    def close(self) -> None:
        """Let go of them."""


_HOLDERS: weakref.WeakSet[Holder] = weakref.WeakSet()
_IN_THE_MIDDLE: list[str] = []  # of what ranks did together, this one stopped
_LEAVES: list[Any] = []  # what was registered for the interpreter's end


def ensure_process_group(timeout_s: float) -> None:
    """Join the process group that torchrun describes, unless the script has done so.

    ``timeout_s`` is how long its collectives wait for a rank, a minute at least: all ranks have to come first.
    """
    ours = not dist.is_initialized()
    if (ours or not _LEAVES) and not torch.cuda.is_available():  # NCCL's own end may wait for ranks that are gone
        _LEAVES.append(atexit.register(_leave, ours))
    if ours:
        # Imported later, its functions would hold the group that there is then, as what they take by default.
        importlib.import_module("torch.distributed.nn")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=max(timeout_s, JOIN_S))
        store = store_of_agents(timeout)
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
            return
        rank, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks, timeout=timeout)


def closed_at_exit(holder: Holder) -> None:
    """Close what holds process groups before the interpreter ends, if it is still open then."""
    _HOLDERS.add(holder)


def _leave(ours: bool) -> None:
    """End the threads of gloo while the interpreter can wait for them; also the group of all ranks, if it is ``ours``.

    A thread that lets go of a tensor later needs the interpreter, finds it gone, and aborts a rank that is done, which
    torchrun takes for a failure. A group's threads end with the last that holds it, and only when they are through with
    what they were given: a rank that stopped in the middle of something would wait for the others, and ends as it is.
    """
    waits = not _IN_THE_MIDDLE and not hasattr(sys, "last_type")
    if waits:
        for holder in list(_HOLDERS):
            holder.close()
        _GROUPS.clear()
        _WORLD[0] = None
    if ours and dist.is_initialized():
        dist.destroy_process_group()
    if waits:
        gc.collect()  # DistributedDataParallel is part of cycles


def make_group(ranks: Sequence[int] | None, backend: str, timeout_s: float | None) -> Any:
    """Make a group of some ranks (None: of all); a call that all ranks make alike.

    Its collectives and messages wait ``timeout_s`` for a rank; None is what torch has by default, half an hour.
    """
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    return dist.new_group(None if ranks is None else list(ranks), backend=backend, timeout=timeout)


def all_ranks(timeout_s: float) -> Any:
    """Return a CPU group of all ranks, made once per process group and timeout."""
    if _WORLD[0] is not dist.group.WORLD:
        _GROUPS.clear()
        _WORLD[0] = dist.group.WORLD
    if timeout_s not in _GROUPS:
        _GROUPS[timeout_s] = make_group(None, "gloo", timeout_s)
    return _GROUPS[timeout_s]


@contextmanager
def at_work(group: Any, timeout_s: float) -> Iterator[None]:
    """Let ranks wait for each other's work, however long it takes, and not for a rank that is gone or stopped.

    All ranks of the group enter, each does what it has to do, and all leave when the last of them is done. Meanwhile a
    thread of each says four times in ``timeout_s`` that its process is alive.

    Raises:
        StallError: a rank said nothing for ``timeout_s``.
        WorkerLost: a rank has ended.
    """
    done = threading.Event()
    failed: list[Exception] = []

    def beat() -> None:
        busy = 1
        try:
            while busy:
                state = torch.tensor([0 if done.wait(timeout_s / 4) else 1])
                dist.all_reduce(state, group=group)
                busy = int(state.item())
        except Exception as error:
            failed.append(error)

    # A daemon: who is interrupted does not wait for the others.
    thread = threading.Thread(target=beat, name="stagecut-at-work", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
    thread.join()
    if failed:
        with peers_told("while it waited for the others' work"):
            raise failed[0]


@contextmanager
def peers_told(where: str) -> Iterator[None]:
    """Turn what gloo says of a rank that is gone or silent into an error that says where it was missed.

    Raises:
        StallError: a rank said nothing for as long as the group waits.
        WorkerLost: the connection to a rank ended.
    """
    try:
        yield
    except BaseException as error:
        _IN_THE_MIDDLE.append(where)
        if not isinstance(error, (PeerGone, RuntimeError)):
            raise
        if not isinstance(error, PeerGone) and not _OF_GLOO.search(str(error)):
            raise
        told = _told(error, where)
        if hasattr(error, "stagecut"):
            told.stagecut = error.stagecut  # type: ignore[attr-defined]
        raise told from error


def _told(error: Exception, where: str) -> StagecutError:
    rank, (reason, *_) = dist.get_rank(), str(error).splitlines()
    site = f" (at {error.stagecut.instruction})" if hasattr(error, "stagecut") else ""
    if _OUT_OF_TIME.search(str(error)):
        return StallError(
            f"rank {rank} heard nothing of another rank for too long, {where}{site}: {reason}",
            hint="look at the ranks' machines and their network; or raise stagecut.compile(..., timeout_s=...) if a "
            "rank may take that long",
        )
    return WorkerLost(
        f"rank {rank} lost another rank, {where}{site}: {reason}",
        hint="the other rank's own error is the cause, where it has one; torchrun --max-restarts N starts all again, "
        "and pm.resume(folder, ...) goes on from the newest whole checkpoint",
    )
