"""What the fuzz targets share: decisions out of bytes, JSON documents with mistakes, and what readers must not do."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Values that readers trip over: limits of integers and floats, what JSON has no words for, text that is no text.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, -1, 255, 1000, 2**31, 2**53 + 1, 2**63, 10**30, -(10**30), 10**400,
    0.5, -0.0, -1.5, 5e-324, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
    "", "a", "0", "cpu", "\x00", "\ud800", "../x", "/etc/passwd", "é" * 3, "x" * 300, "1e9", "nan",
    [], {}, [[]], [0, 0, 0], [None], {"": 0}, {"kind": "tuple", "items": [1]}, {"kind": "counter", "items": [[1, []]]},
)  # fmt: skip
_DEEP = "fuzz: nested deeply"
_EDITS = 4


class Choices:
    """Decisions out of bytes: equal bytes, equal decisions; after the last byte all of them are 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        """Say whether bytes are left."""
        return self._at < len(self._data)

    def number(self, n: int) -> int:
        """Return a number from 0 to ``n - 1``."""
        width = 1 if n <= 256 else 2
        taken = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(taken, "little") % n

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[self.number(len(options))]

    def rest(self) -> bytes:
        """Return what is left."""
        taken = self._data[self._at :]
        self._at = len(self._data)
        return taken


def mutated(document: Any, choices: Choices) -> Any:
    """Return a copy of a JSON document with up to four mistakes in it."""
    whole = [copy.deepcopy(document)]
    for _ in range(_EDITS):
        if not choices.more:
            break
        _edit(whole, choices)
    return whole[0]


def _edit(whole: list[Any], choices: Choices) -> None:
    place, key = _place(whole, choices)
    what = choices.number(7)
    if what in (0, 1):
        place[key] = copy.deepcopy(choices.pick(ODD))
    elif what == 2:
        other, other_key = _place(whole, choices)
        place[key] = copy.deepcopy(other[other_key])
    elif what == 3 and place is not whole:
        del place[key]
    elif what == 4 and isinstance(place, list) and place is not whole:
        place.insert(key, copy.deepcopy(place[key]))
    elif what == 4 and isinstance(place, dict):
        place[choices.pick(("", "x", "format", "items", "\ud800"))] = copy.deepcopy(place[key])
    elif what == 5 and isinstance(place[key], (int, float)) and not isinstance(place[key], bool):
        place[key] = choices.pick((lambda v: v + 1, lambda v: v - 1, lambda v: -v, lambda v: v * 2))(place[key])
    elif what == 6:
        place[key] = _DEEP if choices.number(4) == 3 else choices.rest().decode("utf-8", "replace")


def _place(whole: list[Any], choices: Choices) -> tuple[Any, Any]:
    """Walk down from the top and stop somewhere: a container, and a key in it."""
    place: Any = whole
    key: Any = 0
    while isinstance(place[key], (list, dict)) and place[key]:
        inside = place[key]
        number = choices.number(len(inside) + 1)
        if number == len(inside):
            break
        place, key = inside, number if isinstance(inside, list) else list(inside)[number]
    return place, key


def text_of(document: Any) -> str:
    """Write a document as JSON, with what JSON has no words for as Python writes it."""
    return json.dumps(document).replace(json.dumps(_DEEP), "[" * 60_000 + "]" * 60_000)


@cache
def folder() -> Path:
    """Return a folder for the files that readers are given, in memory where there is such a file system."""
    given = os.environ.get(FOLDER)
    if given is not None:
        return Path(given)
    _KEPT.append(temporary_folder())
    return Path(_KEPT[0].name)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that is removed when it is left, or when the process ends."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="stagecut-fuzz-", dir=shared if os.access(shared, os.W_OK) else None)


FOLDER = "STAGECUT_FUZZ_FOLDER"  # libFuzzer ends its process by itself: who started it makes the folder
_KEPT: list[tempfile.TemporaryDirectory[str]] = []
_FORBIDDEN = (
    "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen",
    "socket.connect", "ctypes.dlopen", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.symlink",
)  # fmt: skip
_LATE = "<class 'networkx.utils.decorators.argmap'>"  # networkx compiles its decorated functions when first called
_seen: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event in _FORBIDDEN:
        _seen.append(f"{event}{arguments}")
    elif event == "open" and len(arguments) > 2 and isinstance(arguments[2], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _seen.append(f"open{arguments}")
    elif event == "compile" and str(arguments[1]).startswith("<") and not str(arguments[1]).startswith(_LATE):
        _seen.append(f"compile{arguments}")  # a module that is imported late has a file


@cache
def _watched() -> None:
    sys.addaudithook(_hook)


@contextmanager
def only_reading() -> Iterator[None]:
    """Fail if the body executes, starts, writes or removes anything that the interpreter's audit sees."""
    global _seen
    _watched()
    _seen = seen = []
    try:
        yield
    finally:
        _seen = None
    assert not seen, f"a reader does more than read: {seen}"
