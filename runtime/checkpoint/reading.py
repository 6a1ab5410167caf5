"""Loading: the newest checkpoint that is whole, tensor by tensor, into whatever plan goes on from it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ..watch.logs import CHECKPOINTS
from . import folder as folders
from .folder import Manifest
from .peers import Alone, Peers, together
from .random_state import restore_random_state
from .records import MODEL, RANDOM, Training
from .state import check_groups, restore_optimizer
from .values import decoded


class Reader:
    """A checkpoint that was verified: tensors by key, one at a time, and what else it holds."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self.manifest = path, manifest
        self.values = _values_of(manifest, path)
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._files: dict[str, Any] = {}
        self.records: dict[str, Any] = {}
        for record in manifest.files:
            file = path / record.name
            if file.suffix == ".json":
                self.records[file.stem] = _record_of(file)
                continue
            try:
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise CheckpointError(f"{file} is no whole safetensors file: {error}") from error
            self._file_of.update(dict.fromkeys(opened.keys(), opened))
            self._files[file.stem] = opened

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the files go."""
        self._stack.close()

    def names(self) -> set[str]:
        """Return the names of the model's parameters and buffers that are there."""
        found = {key.removeprefix(f"{MODEL}/") for key in self._file_of if key.startswith(f"{MODEL}/")}
        return found | set(self.values["aliases"])

    def places(self) -> dict[str, tuple[Path, str]]:
        """Return the file of each of the model's parameters and buffers, and its key there."""
        path_of = {id(opened): self.path / f"{stem}.safetensors" for stem, opened in self._files.items()}
        keys = {name: self._key(name) for name in self.names()}
        return {name: (path_of[id(self._file(key))], key) for name, key in keys.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Read a parameter or buffer of the model."""
        return self.read(self._key(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter or buffer without reading it."""
        key = self._key(name)
        return tuple(self._file(key).get_slice(key).get_shape())

    def _key(self, name: str) -> str:
        return f"{MODEL}/{self.values['aliases'].get(name, name)}"

    def read(self, key: str) -> torch.Tensor:
        """Read a tensor.

        Raises:
            CheckpointError: it is not there.
        """
        from safetensors import SafetensorError

        try:
            found: torch.Tensor = self._file(key).get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{key} in {self.path} is no tensor: {error}") from error
        return found

    def _file(self, key: str) -> Any:
        if key not in self._file_of:
            raise CheckpointError(f"{key} is not in {self.path}")
        return self._file_of[key]

    def states(self) -> dict[str, Any]:
        """Return what optimizers keep beside tensors, by parameter."""
        return {name: kept for record in self.records.values() for name, kept in record["states"].items()}

    def restore_random(self, rank: int) -> None:
        """Set this process's generators as those of the process of that rank were, or of the first one.

        What came from elsewhere has none: they stay as they are.
        """
        process = f"process-{rank:04d}"
        process = process if process in self.records else "process-0000"
        if process not in self.records:
            raise CheckpointError(f"{self.path} holds no state of random generators")
        if self.records[process][RANDOM] is None:
            return
        if process not in self._files:
            raise CheckpointError(f"{self.path} holds no state of random generators")
        file = self._files[process]  # each process has keys of these names in a file of its own
        keys = [key for key in file.keys() if key.startswith(f"{RANDOM}/")]  # noqa: SIM118 - no mapping
        tensors = {key.removeprefix(f"{RANDOM}/"): file.get_tensor(key) for key in keys}
        restore_random_state(tensors, self.records[process][RANDOM])


class Tensors(Mapping[str, torch.Tensor]):
    """The model's tensors by name, each read when it is asked for: no process holds all of them."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._reader.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._reader.names()))

    def __len__(self) -> int:
        return len(self._reader.names())


def found(folder: str | Path, peers: Peers) -> tuple[Reader, list[str]]:
    """Open the newest whole checkpoint of a folder, the same one on every process.

    Raises:
        CheckpointError: there is none.
    """

    def look() -> bytes:
        if peers.rank != 0:
            return b""
        path, _, passed = folders.newest(folder)
        return json.dumps([str(path), passed]).encode()

    path, passed = json.loads(together(peers, look)[0])
    for reason in passed if peers.rank == 0 else ():
        CHECKPOINTS.warning("passed over: %s", reason)
        warnings.warn(f"stagecut: a checkpoint was passed over: {reason}", stacklevel=4)
    opened: list[Reader] = []

    def open_it() -> bytes:
        opened.append(Reader(Path(path), folders.read_manifest(Path(path))))
        return b""

    try:
        together(peers, open_it)
    except BaseException:
        for reader in opened:
            reader.close()
        raise
    return opened[0], passed


def has_checkpoints(folder: str | Path, peers: Peers) -> bool:
    """Say whether a folder has checkpoints, whole or not; the same on every process.

    Raises:
        CheckpointError: it is a file, or some processes see checkpoints that the first one does not.
    """

    def look() -> bytes:
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is a file, and checkpoints are in a folder")
        return str(int(folders.is_checkpoint(path) or bool(folders.checkpoints(path)))).encode()

    seen = [given == b"1" for given in together(peers, look)]
    if not seen[0] and any(seen):
        raise CheckpointError(
            f"rank {seen.index(True)} sees checkpoints in {folder}, and rank 0 sees none",
            hint="save into a folder that all machines share",
        )
    return seen[0]


def read_state(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the model's state dict out of the newest whole checkpoint: it loads into the plain model.

    Raises:
        CheckpointError: there is none.
    """
    reader, _ = found(folder, Alone())
    with reader:
        return {name: reader.tensor(name) for name in sorted(reader.names())}


def check_names(reader: Reader, expected: Mapping[str, tuple[int, ...] | None]) -> None:
    """Hold a checkpoint against the names and shapes of a model; None for a shape that somebody else looks at.

    Raises:
        CheckpointError: they differ.
    """
    missing, strange = sorted(set(expected) - reader.names()), sorted(reader.names() - set(expected))
    if missing or strange:
        raise CheckpointError(
            f"{reader.path} is of another model ({reader.manifest.model}): missing {missing[:4]}, unknown {strange[:4]}"
        )
    for name, shape in expected.items():
        if shape is not None and reader.shape(name) != shape:
            raise CheckpointError(f"{name}: expected shape {shape}, got {reader.shape(name)} in {reader.path}")


_OTHERS = ("scheduler", "scaler", "data")


def check_fits(reader: Reader, training: Training, names: Mapping[int, str]) -> bytes:
    """Look that all that is asked for was saved, and that the optimizer has the groups that were; there is no answer.

    Raises:
        CheckpointError: it was not, or has others; nothing was changed.
    """
    for name in _OTHERS:
        if getattr(training, name) is not None and not reader.values[name]:
            raise CheckpointError(f"{reader.path} was saved without a {name}", hint=f"leave {name}= out")
    if training.optimizer is not None:
        if not reader.values["has_optimizer"]:
            raise CheckpointError(f"{reader.path} was saved without an optimizer", hint="leave optimizer= out")
        check_groups(training.optimizer, names, reader.values["groups"])
    return b""


def restore(
    reader: Reader, training: Training, names: Mapping[int, str], holds: Callable[[str], bool], rank: int
) -> Any:
    """Give the rest of a training its state back, the random generators last; returns what ``data`` was saved as.

    It was looked at by :func:`check_fits`.
    """
    for name in _OTHERS:
        thing = getattr(training, name)
        if thing is not None and hasattr(thing, "load_state_dict"):
            thing.load_state_dict(decoded(reader.values[name][0]))
    if training.optimizer is not None:
        groups = reader.values["groups"]
        restore_optimizer(training.optimizer, names, groups, reader.states(), reader.read, holds)
    reader.restore_random(rank)
    kept = reader.values["data"]
    return decoded(kept[0]) if kept else None


def _values_of(manifest: Manifest, path: Path) -> dict[str, Any]:
    lists = ("groups", "scheduler", "scaler", "data")
    values = _json_object(manifest.values, path, ("aliases", "has_optimizer", *lists))
    aliases, groups = values["aliases"], values["groups"]
    known = isinstance(aliases, dict) and all(isinstance(name, str) for name in aliases.values())
    known = known and isinstance(groups, list) and all(map(_is_group, groups))
    if not known or not all(_is_optional(values[name]) for name in lists[1:]):
        raise CheckpointError(f"{path} holds values that are none of a checkpoint")
    return values


def _is_group(group: Any) -> bool:
    if not isinstance(group, dict) or {"names", "settings"} != set(group) or not isinstance(group["names"], list):
        return False
    return all(isinstance(name, str) for name in group["names"]) and _is_settings(group["settings"])


def _is_settings(settings: Any) -> bool:
    """Say whether something has a value in a list of its own, or None for a tensor, under every key."""
    kept = settings.values() if isinstance(settings, dict) else (0,)
    return all(value is None or (_is_optional(value) and value) for value in kept)


def _is_optional(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 1


def _record_of(file: Path) -> dict[str, Any]:
    """Read what a process wrote beside its tensors."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: {error}") from error
    record = _json_object(text, file, ("states", RANDOM))
    states = record["states"]
    if (
        not isinstance(record[RANDOM], dict | None)
        or not isinstance(states, dict)
        or not all(map(_is_settings, states.values()))
    ):
        raise CheckpointError(f"{file} holds values that are none of a checkpoint")
    return record


def _json_object(text: str, path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict) or set(value) != set(keys):
        raise CheckpointError(f"{path} does not hold {', '.join(keys)}")
    return value
