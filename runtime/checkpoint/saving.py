"""Saving: a model, its optimizer and all that a training loop needs to go on, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from ..sharded import dense
from ..watch.logs import CHECKPOINTS
from . import folder as folders
from .folder import FORMAT, FileRecord, Manifest
from .peers import Peers, together
from .random_state import random_state
from .records import MODEL, RANDOM, Placement, Training
from .state import optimizer_groups, optimizer_states
from .values import encoded


class Saving:
    """A checkpoint that is being written; :meth:`wait` for it to be there."""

    def __init__(self, write: Callable[[], Path], in_background: bool) -> None:
        self._path: Path | None = None
        self._error: Exception | None = None
        self.told = False  # whether somebody has heard what it failed at
        if not in_background:
            self._path = write()
            return
        # Nobody else holds what is to be written. Not a daemon: the interpreter waits for it.
        self._thread = threading.Thread(target=self._run, args=(write,), name="stagecut-checkpoint")
        self._thread.start()

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            self._path = write()
        except Exception as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Say whether it is written, or failed."""
        return self._path is not None or self._error is not None

    def wait(self) -> Path:
        """Return the checkpoint's folder once it is whole.

        Raises:
            CheckpointError: it could not be written; earlier ones are as they were.
        """
        if self._path is None:
            self._thread.join()
        if self._error is not None:
            self.told = True
            raise self._error
        assert self._path is not None
        return self._path


@dataclass(frozen=True)
class Snapshot:
    """All that one process writes, as it was at one moment."""

    files: dict[str, dict[str, torch.Tensor]]
    records: dict[str, Any]
    manifest: Manifest


def snapshot(
    model: nn.Module,
    placement: Placement,
    training: Training,
    step: int,
    shape: tuple[str, tuple[int, ...]],
    rank: int,
    copy: bool,
) -> Snapshot:
    """Take what is to be written: by reference, or as a copy that training may go on beside.

    ``shape`` is the fingerprint of the captured graph, and the replicas of each stage.

    Raises:
        CheckpointError: something cannot be kept without pickle; the message has the path to it.
    """
    state = dict(model.state_dict(keep_vars=True))
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise CheckpointError(f"{strange[0]} of the model's state is no tensor, and a checkpoint holds tensors")
    first, aliases = _first_names(state)
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    file_of = {name: file for file, own in placement.files.items() for name in own}
    files: dict[str, dict[str, torch.Tensor]] = {file: {} for file in placement.files}
    for name in first:
        # Replicas that each have a share gather them together, and one of them writes.
        whole = dense(state[name].detach()) if placement.holds(name) else None
        if name in file_of and whole is not None:
            files[file_of[name]][f"{MODEL}/{name}"] = whole
    records: dict[str, Any] = {"states": {}}
    groups: list[Any] = []
    if training.optimizer is not None:
        tensors, records["states"] = optimizer_states(training.optimizer, names, file_of.__contains__)
        for name, own_tensors in tensors.items():
            files[file_of[name]].update(own_tensors)
        settings, groups = optimizer_groups(training.optimizer, names)
        if rank == 0:
            files.setdefault("process-0000", {}).update(settings)
    random_tensors, records[RANDOM] = random_state()
    own = files.setdefault(f"process-{rank:04d}", {})
    own.update({f"{RANDOM}/{key}": tensor for key, tensor in random_tensors.items()})
    values = {"aliases": aliases, "groups": groups, "has_optimizer": training.optimizer is not None}
    values |= {name: _state_of(name, getattr(training, name)) for name in ("scheduler", "scaler", "data")}
    fingerprint, replicas = shape
    text = json.dumps(values, allow_nan=False)
    manifest = Manifest(FORMAT, step, type(model).__name__, fingerprint, len(replicas), replicas, (), text)
    return Snapshot({file: _flat(tensors, copy) for file, tensors in files.items() if tensors}, records, manifest)


def _first_names(state: Mapping[str, torch.Tensor]) -> tuple[list[str], dict[str, str]]:
    """Return the first name of every tensor, and what the others are other names of."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return list(first.values()), aliases


def _flat(tensors: dict[str, torch.Tensor], copy: bool) -> dict[str, torch.Tensor]:
    """Bring tensors to the CPU, each in memory of its own, as safetensors wants them."""
    return {key: _own(tensor, copy) for key, tensor in sorted(tensors.items())}


def _own(tensor: torch.Tensor, copy: bool) -> torch.Tensor:
    found = tensor.cpu().contiguous()
    shared = found.untyped_storage().nbytes() != found.numel() * found.element_size()
    return found.clone() if (copy and found.data_ptr() == tensor.data_ptr()) or shared else found


def _state_of(name: str, thing: Any) -> Any:
    """Return [] for nothing, else a list of one: the state dict of a thing that has one, or the thing itself."""
    if thing is None:
        return []
    state = thing.state_dict() if hasattr(thing, "state_dict") else thing
    return [encoded(state, name)]


def taken_together(peers: Peers, take: Callable[[], Snapshot]) -> Snapshot:
    """Take every process's part, or raise on all of them what one of them could not take.

    Raises:
        CheckpointError: see :func:`snapshot`.
    """
    taken: list[Snapshot] = []

    def own() -> bytes:
        taken.append(take())
        return b""

    together(peers, own)
    return taken[0]


def write(folder: Path, taken: Snapshot, peers: Peers, keep: int | None) -> Path:
    """Write what every process has taken, and make a checkpoint of it when all of it is on the disk.

    Raises:
        CheckpointError: one of the processes could not write its part; nothing of it is left.
    """
    step, rank = taken.manifest.step, peers.rank
    started = together(peers, lambda: str(folders.begin(folder, step, os.getpid())).encode() if rank == 0 else b"")
    unfinished = Path(started[0].decode())
    try:
        written = together(peers, lambda: _write_own(unfinished, taken, rank))
        files = tuple(FileRecord(**record) for own in written for record in json.loads(own))
        manifest = Manifest(**{**vars(taken.manifest), "files": files})
        finished = together(peers, lambda: _finish(unfinished, manifest, keep) if rank == 0 else b"")
    except Exception:
        if rank == 0:
            folders.abandon(unfinished)
        raise
    path = Path(finished[0].decode())
    CHECKPOINTS.info("saved %s", path)
    return path


def _write_own(unfinished: Path, taken: Snapshot, rank: int) -> bytes:
    from safetensors.torch import save_file

    records = []
    for name, tensors in taken.files.items():
        path = unfinished / f"{name}.safetensors"
        with folders.reported(path):
            try:
                save_file(tensors, path)
            except Exception as error:  # safetensors' own class for what the system says
                number = re.search(r"os error (\d+)", str(error))
                raise OSError(int(number[1]) if number else getattr(error, "errno", None), str(error)) from error
        records.append(folders.sealed(path))
    path = unfinished / f"process-{rank:04d}.json"
    with folders.reported(path):
        path.write_text(json.dumps(taken.records, allow_nan=False), encoding="utf-8")
    records.append(folders.sealed(path))
    return json.dumps([vars(record) for record in records]).encode()


def _finish(unfinished: Path, manifest: Manifest, keep: int | None) -> bytes:
    path = folders.finish(unfinished, manifest)
    if keep is not None:
        folders.keep_last(path.parent, manifest.step, keep)
    return str(path).encode()
