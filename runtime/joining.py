"""How the ranks that torchrun started this time find each other, in a store that those of earlier times have used.

torchrun's agents keep one store over restarts (torch 2.13; https://github.com/pytorch/pytorch/issues/135712), and what
the ranks of before wrote there is read by those of now: addresses at which nobody listens any more. So rank 0 names a
part of the store that nobody has used, and tells it to each rank that asks now; what dead ranks asked is answered too,
and does no harm.
"""

from __future__ import annotations

import os
import secrets
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import StallError

_ROOM, _HELLO, _HERE = "stagecut", "hello", "here"


def store_of_agents(timeout: timedelta) -> Any:
    """Return a store for the ranks of now, or None where no agent keeps one: torch's own way is good then.

    Raises:
        StallError: not all ranks came in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    return fresh_part(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def fresh_part(store: Any, rank: int, n_ranks: int) -> Any:
    """Return a part of the store that these ranks use, and no others ever did; all of them call it.

    Raises:
        StallError: not all of them did within the store's timeout.
    """
    prefixed: Any = dist.PrefixStore  # type: ignore[attr-defined]
    room, own = prefixed(_ROOM, store), secrets.token_hex(16)
    try:
        if rank == 0:
            _receive(room, own, n_ranks - 1)
        else:
            room.queue_push("arrivals", f"{_HELLO} {rank} {own}")
            own = room.get(own).decode()
            room.queue_push("arrivals", f"{_HERE} {rank} {own}")
    except dist.DistStoreError as error:
        raise StallError(
            f"rank {rank} of {n_ranks} waited {store.timeout.total_seconds():.0f} s for the other ranks to start: "
            f"{str(error).splitlines()[0]}",
            hint="look for the error of the rank that did not; or raise stagecut.compile(..., timeout_s=...)",
        ) from error
    return prefixed(f"{_ROOM}/{own}", store)


def _receive(room: Any, name: str, n_others: int) -> None:
    """Tell everybody who asks the name, until so many have said that they know it."""
    present: set[str] = set()
    while len(present) < n_others:
        what, rank, word = room.queue_pop("arrivals").decode().split()
        if what == _HELLO:
            room.set(word, name)
        elif word == name:
            present.add(rank)
