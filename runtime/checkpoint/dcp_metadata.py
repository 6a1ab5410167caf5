"""What a checkpoint of ``torch.distributed.checkpoint`` says that it holds, read without executing anything.

Its ``.metadata`` is a pickle, and unpickling calls whatever the file names. Here only the few names that such a file
needs are known, and none of them is the thing itself: records come out as inert objects that keep what they were given,
and everything is looked at before it is used.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch

from ...errors import CheckpointError

METADATA = ".metadata"
Size = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Bytes of a file that ``torch.save`` wrote: a box of a tensor, or a value (no ``offsets``)."""

    file: Path
    start: int
    n_bytes: int
    offsets: Size
    sizes: Size


@dataclass(frozen=True)
class Entry:
    """One entry of a state dict: where it is in the nested dicts and lists, and its pieces; no dtype for a value."""

    path: tuple[str | int, ...]
    dtype: torch.dtype | None
    shape: Size
    pieces: tuple[Piece, ...]


class _Inert:
    """Stands for an object of a pickle: keeps what it was called with and what its state is, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """Return an attribute; None, as all defaults are, where the file has none."""
        state = getattr(self, "state", None)
        return state.get(name) if isinstance(state, dict) else None


class _Metadata(_Inert):
    """The whole."""


class _Tensor(_Inert):
    """A tensor of the state dict."""


class _Bytes(_Inert):
    """A value of the state dict."""


class _Chunk(_Inert):
    """A box of a tensor."""


class _Properties(_Inert):
    """A tensor's dtype, and what else there is to say."""


class _Index(_Inert):
    """The name of what is stored, and where it begins in its tensor."""


class _Info(_Inert):
    """Where it is stored."""


_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_KNOWN: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): _Bytes,
    (_METADATA, "ChunkStorageMetadata"): _Chunk,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "MetadataIndex"): _Index,
    (_FILESYSTEM, "_StorageInfo"): _Info,
    (_METADATA, "StorageMeta"): _Inert,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Inert,
    (_FILESYSTEM, "_StoragePrefix"): _Inert,
    ("torch.serialization", "_get_layout"): _Inert,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, kind): _Inert for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")},
}


class _Careful(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is None and module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if known is None:
            raise CheckpointError(f"it names {module}.{name}, which no metadata needs; nothing of it was executed")
        return known


def entries_of(folder: Path) -> list[Entry]:
    """Read what a checkpoint holds.

    Raises:
        CheckpointError: there is no metadata, it names what it need not, or it contradicts itself or its files.
    """
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint of torch.distributed.checkpoint: it has no {METADATA}")
    try:
        with path.open("rb") as file:
            metadata = _Careful(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from error
    except Exception as error:  # a pickle that is none can fail in any way
        raise CheckpointError(f"{path} is no metadata of a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, _Metadata):
        raise CheckpointError(f"{path} holds no metadata of a checkpoint")
    try:
        return _entries(metadata, folder)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from error


def _entries(metadata: _Metadata, folder: Path) -> list[Entry]:
    held, paths = metadata.get("state_dict_metadata"), metadata.get("planner_data")
    stored = _stored(metadata.get("storage_data"), folder)
    if not isinstance(held, dict) or not (paths is None or isinstance(paths, dict)):
        _refuse("it lists no entries")
    found = []
    for name, entry in held.items():
        if not isinstance(name, str):
            _refuse(f"an entry is named {name!r}")
        where = (name,) if paths is None else paths.get(name)
        if not isinstance(where, tuple) or not where or not all(type(part) in (str, int) for part in where):
            _refuse(f"{name} is nowhere in the state dict")
        if isinstance(entry, _Bytes):
            found.append(Entry(where, None, (), (_piece(stored, name, None, ()),)))
        elif isinstance(entry, _Tensor):
            found.append(_tensor(name, where, entry, stored))
        else:
            _refuse(f"{name} is neither tensor nor value")
    return found


def _tensor(name: str, where: tuple[str | int, ...], entry: _Tensor, stored: dict[Any, Piece]) -> Entry:
    properties, chunks = entry.get("properties"), entry.get("chunks")
    state = getattr(properties, "state", None)
    dtype = state[0] if isinstance(state, tuple) and state else None
    shape = _size(name, entry.get("size"))
    if not isinstance(properties, _Properties) or not isinstance(dtype, torch.dtype):
        _refuse(f"{name} has no dtype")
    if not isinstance(chunks, list) or not all(isinstance(chunk, _Chunk) for chunk in chunks):
        _refuse(f"{name} has no chunks")
    pieces = []
    for chunk in chunks:
        offsets, sizes = _size(name, chunk.get("offsets")), _size(name, chunk.get("sizes"))
        if not len(offsets) == len(sizes) == len(shape) or any(a + b > c for a, b, c in zip(offsets, sizes, shape)):
            _refuse(f"{name} has a chunk of {sizes} at {offsets}, and shape {shape}")
        piece = _piece(stored, name, offsets, sizes)
        if _count(sizes) * dtype.itemsize > piece.n_bytes:
            _refuse(f"{name} has a chunk of {sizes}, in {piece.n_bytes} bytes")
        pieces.append(piece)
    if sum(_count(piece.sizes) for piece in pieces) != _count(shape):
        _refuse(f"{name} has shape {shape}, and its chunks do not make it up")
    return Entry(where, dtype, shape, tuple(pieces))


def _stored(data: Any, folder: Path) -> dict[Any, Piece]:
    """Return where everything is, by name and offset; each place lies within a file of the folder."""
    if not isinstance(data, dict):
        _refuse("it does not say where its entries are")
    found: dict[Any, Piece] = {}
    for index, info in data.items():
        if not isinstance(index, _Index) or not isinstance(info, _Info):
            _refuse("it does not say where its entries are")
        name, offset = index.get("fqn"), index.get("offset")
        if not isinstance(name, str):
            _refuse(f"a place belongs to {name!r}")
        relative, start, length = (info.get(key) for key in ("relative_path", "offset", "length"))
        if info.get("transform_descriptors"):
            _refuse(f"{name} is stored with {info.get('transform_descriptors')}, which this version cannot undo")
        if not isinstance(relative, str) or not all(type(n) is int and n >= 0 for n in (start, length)):
            _refuse(f"{name} is nowhere in the files")
        if PurePosixPath(relative).name != relative or relative in (".", ".."):
            _refuse(f"{name} is in {relative!r}, which is no file of the folder")
        file = folder / relative
        if not file.is_file() or file.is_symlink() or file.stat().st_size < start + length:
            _refuse(f"{file} is missing, or shorter than {start + length} bytes")
        key = (name, None if offset is None else _size(name, offset))
        found[key] = Piece(file, start, length, (), ())
    return found


def _piece(stored: dict[Any, Piece], name: str, offsets: Size | None, sizes: Size) -> Piece:
    place = stored.get((name, offsets))
    if place is None:
        _refuse(f"{name} is nowhere in the files")
    return Piece(place.file, place.start, place.n_bytes, offsets or (), sizes)


def _size(name: str, value: Any) -> Size:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        _refuse(f"{name} has a size of {value!r}")
    return value


def _count(sizes: Size) -> int:
    count = 1
    for n in sizes:
        count *= n
    return count


def _refuse(why: str) -> NoReturn:
    raise CheckpointError(why)
