"""Checkpoints as folders: written beside the others under another name, renamed when whole, and verified when read.

``FOLDER/step-00000012/`` holds safetensors files and ``manifest.json`` with the size and SHA-256 of each. What is being
written is in ``FOLDER/.tmp-00000012-PID/`` until everything has reached the disk; a rename is atomic (POSIX), so a
folder that has its name is whole, whoever was killed when.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, PlanError
from ...records import from_json, to_json

FORMAT = 1
MANIFEST = "manifest.json"
_MANIFEST, _SUM = "manifest", "sha256"
_STEP = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"\.tmp-\d+-(\d+)")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint: its name in the folder, its size, and the SHA-256 of what is in it, in hexadecimal."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        format: version of this record.
        step: optimizer steps that were done.
        model: class of the model; fingerprint: of its graph, or "" if it was not captured yet.
        stages, replicas: of the pipeline that wrote it; any other can read it.
        files: every other file of the folder.
        values: the rest, as JSON text: groups of the optimizer, scheduler, scaler, position in the data.
    """

    format: int
    step: int
    model: str
    fingerprint: str
    stages: int
    replicas: tuple[int, ...]
    files: tuple[FileRecord, ...]
    values: str


def step_folder(folder: Path, step: int) -> Path:
    """Name the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def begin(folder: Path, step: int, writer: int) -> Path:
    """Make the folder that a checkpoint is written into, after clearing what writers that are gone left behind.

    Raises:
        CheckpointError: the step has a checkpoint already, or the folder cannot be made.
    """
    final = step_folder(folder, step)
    if final.exists():
        _set_aside(final)
    unfinished = folder / f".tmp-{step:08d}-{writer}"
    with reported(unfinished):
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.iterdir():
            match = _UNFINISHED.fullmatch(other.name)
            if match and (int(match[1]) == writer or not _is_alive(int(match[1]))):
                shutil.rmtree(other, ignore_errors=True)
        unfinished.mkdir()
    return unfinished


def _set_aside(final: Path) -> None:
    """Move a checkpoint away that is not whole: whoever went on from the one before comes to its step again.

    Raises:
        CheckpointError: it is whole, and no checkpoint is overwritten.
    """
    try:
        verified(final)
    except CheckpointError as error:
        broken = final.with_name(f"broken-{final.name}-{os.getpid()}")
        with reported(final):
            final.rename(broken)
        warnings.warn(f"stagecut: {error.message}; it is {broken.name} now", stacklevel=2)
        return
    raise CheckpointError(f"{final} exists, and no checkpoint is overwritten", hint="save another step, or move it")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def sealed(path: Path) -> FileRecord:
    """Bring a file that was written to the disk, and describe it.

    Raises:
        CheckpointError: the disk does not take it.
    """
    with reported(path):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return FileRecord(path.name, path.stat().st_size, _sha256(path))


def finish(unfinished: Path, manifest: Manifest) -> Path:
    """Write the manifest, bring all to the disk, and give the folder its name.

    Raises:
        CheckpointError: the disk does not take it; what was written is removed.
    """
    final = step_folder(unfinished.parent, manifest.step)
    with reported(final):
        path = unfinished / MANIFEST
        value = to_json(manifest)
        text = json.dumps({_MANIFEST: value, _SUM: _sum_of(value)}, indent=1, allow_nan=False)
        path.write_text(f"{text}\n", encoding="utf-8")
        sealed(path)
        _sync_folder(unfinished)
        unfinished.rename(final)
        _sync_folder(final.parent)
    return final


def abandon(unfinished: Path) -> None:
    """Remove what was written of a checkpoint that will not be finished."""
    shutil.rmtree(unfinished, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_last(folder: Path, step: int, count: int) -> None:
    """Remove all but the newest ``count`` checkpoints up to a step; what a removal that was cut short left goes later.

    Later ones neither count nor go: they were not whole if somebody went on from an earlier one.
    """
    earlier = [path for path in checkpoints(folder) if _step_of(path) <= step]
    for path in earlier[count:]:
        removed = folder / f".tmp-{path.name.removeprefix('step-')}-{os.getpid()}"
        path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, newest step first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP.fullmatch(path.name)), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def is_checkpoint(path: Path) -> bool:
    """Say whether a path names one checkpoint, and not a folder of them."""
    return bool(_STEP.fullmatch(path.name)) or (path / MANIFEST).is_file()


def newest(folder: str | Path) -> tuple[Path, Manifest, list[str]]:
    """Return the newest checkpoint that is whole, its manifest, and why newer ones were passed over.

    ``folder`` may be one checkpoint too.

    Raises:
        CheckpointError: there is none; or the one that was asked for is not whole.
    """
    folder = Path(folder)
    if is_checkpoint(folder):
        return folder, verified(folder), []
    found = checkpoints(folder)
    passed: list[str] = []
    for path in found:
        try:
            return path, verified(path), passed
        except CheckpointError as error:
            passed.append(error.message)
    if found:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(passed)}")
    raise CheckpointError(f"there is no checkpoint in {folder}", hint="pm.save(folder, step=...) writes one")


def verified(path: Path) -> Manifest:
    """Read a manifest, and hold every file against it: nothing missing, added, shorter, longer or changed.

    Raises:
        CheckpointError: naming the first file that is not what the manifest says.
    """
    manifest = read_manifest(path)
    for record in manifest.files:
        file = path / record.name
        with reported(file):  # a name that no file can have
            is_there = Path(record.name).name == record.name and file.is_file() and not file.is_symlink()
        if not is_there:
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != record.n_bytes:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, and {record.n_bytes} were written")
        with reported(file):
            digest = _sha256(file)
        if digest != record.sha256:
            raise CheckpointError(f"{file} is not what was written: its SHA-256 is {digest[:12]}…")
    known = {MANIFEST, *(record.name for record in manifest.files)}
    strangers = sorted(other.name for other in path.iterdir() if other.name not in known)
    if strangers:
        raise CheckpointError(f"{path / strangers[0]} does not belong to the checkpoint")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read what a checkpoint says of itself, without looking at its files.

    Raises:
        CheckpointError: it is no manifest.
    """
    path = folder / MANIFEST
    try:
        whole: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(whole, dict) or set(whole) != {_MANIFEST, _SUM}:
            raise CheckpointError(f"{path} is no manifest of a checkpoint")
        value = whole[_MANIFEST]
        if whole[_SUM] != _sum_of(value):
            raise CheckpointError(f"{path} is not what was written: its own checksum says so")
        if isinstance(value, dict) and value.get("format") != FORMAT:
            raise CheckpointError(f"{path}: this version reads format {FORMAT}, got {value.get('format')!r}")
        return from_json(Manifest, value)
    except (OSError, ValueError, RecursionError, PlanError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _sum_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever its layout in the file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn what the system says of a file into a :class:`CheckpointError` with the path and the room that is left."""
    try:
        yield
    except OSError as error:
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"free some room: {_free(path)} bytes are left there; earlier checkpoints are as they were"
        raise CheckpointError(f"{path}: {error.strerror or error}", hint=hint) from error


def _free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
