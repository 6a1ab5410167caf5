"""Exchange with ``torch.distributed.checkpoint``: its checkpoints as stagecut's, and the other way round.

https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from .dcp_metadata import Entry, Piece, entries_of
from .folder import FORMAT, Manifest
from .peers import Alone
from .reading import Reader, found
from .records import MODEL, RANDOM
from .saving import Snapshot, write
from .state import GROUP, STATE
from .values import decoded, encoded

_STEP, _DATA, _OPTIMIZER = "step", "data", "optimizer"


def read_dcp(source: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ``torch.distributed.checkpoint``, whole, as the state dict that it was saved from.

    Nothing in it is executed. ``pm.load_state_dict(read_dcp(folder)["model"])`` loads one that was saved from
    ``{"model": model.state_dict()}``.

    Raises:
        CheckpointError: it is none, is not whole, or holds or names what need not be there.
    """
    nested: dict[str | int, Any] = {}
    for entry in entries_of(Path(source)):
        at = nested
        for part in entry.path[:-1]:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise CheckpointError(f"{source}: {entry.path} is inside of what is no dict")
        if entry.path[-1] in at:
            raise CheckpointError(f"{source}: {entry.path} is there twice")
        at[entry.path[-1]] = _value(entry)
    listed: dict[str, Any] = _listed(nested)
    return listed


def _listed(value: Any) -> Any:
    """Make lists of dicts whose keys are all numbers from 0 on: places in the state dict's lists."""
    if not isinstance(value, dict):
        return value
    if value and set(value) == set(range(len(value))):
        return [_listed(value[index]) for index in range(len(value))]
    return {key: _listed(item) for key, item in value.items()}


def _value(entry: Entry) -> Any:
    if entry.dtype is None:
        return _loaded(entry.pieces[0], entry)
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    filled = torch.zeros(entry.shape, dtype=torch.bool) if len(entry.pieces) > 1 else None
    for piece in entry.pieces:
        tensor = _loaded(piece, entry)
        fits = isinstance(tensor, torch.Tensor) and tensor.dtype == entry.dtype and tuple(tensor.shape) == piece.sizes
        if not fits:
            raise CheckpointError(f"{piece.file}: {_named(entry)} is not the tensor that the metadata says")
        box = tuple(slice(offset, offset + size) for offset, size in zip(piece.offsets, piece.sizes))
        whole[box] = tensor
        if filled is not None:
            filled[box] = True
    if filled is not None and not filled.all():
        raise CheckpointError(f"{entry.pieces[0].file.parent}: the chunks of {_named(entry)} do not make it up")
    return whole


def _loaded(piece: Piece, entry: Entry) -> Any:
    with piece.file.open("rb") as file:
        file.seek(piece.start)
        data = file.read(piece.n_bytes)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        (reason, *_) = [line for line in str(error).splitlines() if "GLOBAL" in line] or str(error).splitlines()
        raise CheckpointError(f"{piece.file}: {_named(entry)} holds more than tensors and numbers: {reason}") from error
    except Exception as error:  # damaged bytes can fail in any way
        raise CheckpointError(f"{piece.file}: {_named(entry)} cannot be read: {error}") from error


def _named(entry: Entry) -> str:
    return ".".join(map(str, entry.path))


def from_dcp(
    source: str | Path, folder: str | Path, step: int, *, model: str | None = "model", optimizer: str | None = None
) -> Path:
    """Write a checkpoint of ``torch.distributed.checkpoint`` as one of stagecut, for ``pm.load`` and ``pm.resume``.

    One process calls this, and holds all of it. The generators of random numbers are not in it: loading it leaves them
    as they are.

    Args:
        source: the folder that ``torch.distributed.checkpoint.save`` wrote.
        folder: where the checkpoints of the run are to be.
        step: the optimizer steps that were done.
        model: the key of the model's state dict, or None where it is the whole.
        optimizer: the key of the optimizer's state, by the parameters' names, as
            ``torch.distributed.checkpoint.state_dict.get_state_dict`` has it; None leaves it out.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: it cannot be read (see :func:`read_dcp`), has no such keys, or the step has a checkpoint.
    """
    whole = read_dcp(source)
    state = whole if model is None else _part(whole, model, source)
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise CheckpointError(
            f"{strange[0]} of {source} is no tensor, and a model's state is tensors by name",
            hint=f"model= is the key of the model's state dict; there are {', '.join(map(str, whole))}",
        )
    tensors = {f"{MODEL}/{name}": tensor for name, tensor in state.items()}
    states: dict[str, Any] = {}
    groups: list[Any] = []
    if optimizer is not None:
        states, groups = _optimizer(_part(whole, optimizer, source), set(state), tensors, source)
    values = {"aliases": {}, "groups": groups, "has_optimizer": optimizer is not None}
    text = json.dumps({**values, "scheduler": [], "scaler": [], "data": []}, allow_nan=False)
    manifest = Manifest(FORMAT, step, "torch.distributed.checkpoint", "", 0, (), (), text)
    files = {"stage-0000": {key: tensor.contiguous() for key, tensor in sorted(tensors.items())}}
    return write(Path(folder), Snapshot(files, {"states": states, RANDOM: None}, manifest), Alone(), None)


def _part(whole: Mapping[str, Any], key: str, source: str | Path) -> dict[str, Any]:
    part = whole.get(key)
    if not isinstance(part, dict):
        raise CheckpointError(f"{source} has no {key!r}", hint=f"there are {', '.join(map(str, whole))}")
    return part


def _optimizer(
    part: dict[str, Any], names: set[str], tensors: dict[str, torch.Tensor], source: str | Path
) -> tuple[dict[str, Any], list[Any]]:
    """Return the states and groups as a checkpoint has them; their tensors go into ``tensors``."""
    states: dict[str, Any] = {}
    groups: list[Any] = []
    given, listed = part.get("state", {}), part.get("param_groups", [])
    if not isinstance(given, dict) or not isinstance(listed, list) or not all(isinstance(g, dict) for g in listed):
        raise CheckpointError(f"{source} has no optimizer's state and groups there")
    of_groups = [name for group in listed for name in group.get("params", [])]
    unknown = [name for name in [*given, *of_groups] if name not in names]
    if unknown:
        raise CheckpointError(
            f"the optimizer in {source} has state of {unknown[0]!r}, which is no parameter's name",
            hint="save it as torch.distributed.checkpoint.state_dict.get_state_dict(model, optimizer) has it",
        )
    for name, state in given.items():
        states[name] = {key: _kept(value, f"{STATE}/{name}/{key}", tensors) for key, value in state.items()}
    for index, group in enumerate(listed):
        settings = {key: value for key, value in group.items() if key != "params"}
        kept = {key: _kept(value, f"{GROUP}/{index}/{key}", tensors) for key, value in settings.items()}
        groups.append({"names": list(group.get("params", [])), "settings": kept})
    return states, groups


def _kept(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[key] = value
        return None
    return [encoded(value, key)]


def to_dcp(folder: str | Path, target: str | Path) -> Path:
    """Write the newest whole checkpoint of a folder, or one, as ``torch.distributed.checkpoint`` would.

    Its state dict is ``{"model": …, "optimizer": …, "step": …, "data": …}``: the model's own, and the optimizer's by
    the parameters' names, as ``torch.distributed.checkpoint.state_dict.get_state_dict`` has them; without the keys of
    what was not saved. One process calls this, and holds all of it. Reading it by torch executes pickle, as always.

    Returns:
        ``target``.

    Raises:
        CheckpointError: there is no whole checkpoint, ``target`` exists, or it cannot be written; nothing is left then.
    """
    from torch.distributed.checkpoint import save  # type: ignore[attr-defined]

    target = Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists, and no checkpoint is overwritten", hint="write into another folder")
    reader, _ = found(folder, Alone())
    with reader:
        state: dict[str, Any] = {"model": {name: reader.tensor(name) for name in sorted(reader.names())}}
        state[_STEP] = reader.manifest.step
        if reader.values["has_optimizer"]:
            state[_OPTIMIZER] = _by_name(reader)
        if reader.values["data"]:
            state[_DATA] = decoded(reader.values["data"][0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a process that is alone, which is meant
            save(state, checkpoint_id=target, no_dist=True)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, Exception):
            raise CheckpointError(f"{target} could not be written: {error}") from error
        raise
    return target


def _by_name(reader: Reader) -> dict[str, Any]:
    """Return the optimizer's state by the parameters' names."""

    def value(kept: Any, key: str) -> Any:
        return reader.read(key) if kept is None else decoded(kept[0])

    states = {
        name: {key: value(kept, f"{STATE}/{name}/{key}") for key, kept in state.items()}
        for name, state in reader.states().items()
    }
    groups = [
        {
            **{key: value(kept, f"{GROUP}/{index}/{key}") for key, kept in group["settings"].items()},
            "params": list(group["names"]),
        }
        for index, group in enumerate(reader.values["groups"])
    ]
    return {"state": states, "param_groups": groups}
