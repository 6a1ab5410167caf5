"""What a recording is made of, as plain data: calls, and references between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .numbers import Guard, Known, Ref, plain

if TYPE_CHECKING:
    from .forks import Fork

Path = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Region:
    """The grad mode, autocast and use of cuDNN that a call ran under, where the model's code set them itself."""

    grad: bool | None = None
    autocast: tuple[tuple[str, bool, str], ...] = ()
    cudnn: bool | None = None


@dataclass
class Call:
    """One recorded call.

    ``args`` and ``kwargs`` hold :class:`Ref` for values, known numbers, and constants. ``shapes`` are those of the
    result's tensors by path. ``group`` numbers the ``torch.utils.checkpoint`` call that it was made in. Of a call that
    only one mode makes, ``only`` names the module whose mode decides and whether it is made in training. A call with
    ``op`` "checkpoint" or "skippable" has the calls inside as ``body``, its own placeholders first, and gives the
    values ``results``.
    """

    op: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    source: str | None = None
    region: Region = Region()
    shapes: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    group: int | None = None
    only: tuple[str, bool] | None = None
    body: list[Call] = field(default_factory=list)
    results: list[Ref] = field(default_factory=list)


@dataclass
class Recording:
    """One run of the model: its calls in order, placeholders first, and its result with references in it.

    ``objects`` holds what calls use and no code can spell: tensors that belong to no module, generators, classes.
    ``entered`` lists the modules that were called, ``groups`` the options of every checkpoint, ``written`` the
    parameters and buffers that were changed in place, ``lengths`` what ``len`` said of tensors and where, ``forks``
    the branches that random numbers decided; ``rows`` is the batch size.
    """

    calls: list[Call]
    result: Any
    objects: dict[str, Any]
    guards: list[Guard]
    entered: set[str]
    groups: dict[int, dict[str, Any]]
    written: set[str] = field(default_factory=set)
    lengths: list[tuple[int, str, str | None]] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    rows: int = 0


def map_values(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to the leaves of nested tuples, lists, dicts and slices; other containers are leaves."""
    if isinstance(value, torch.Size):
        return tuple(map_values(function, item) for item in value)
    if isinstance(value, tuple):
        items = [map_values(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if type(value) is list:
        return [map_values(function, item) for item in value]
    if type(value) is dict:
        return {key: map_values(function, item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_values(function, item) for item in (value.start, value.stop, value.step)))
    return function(value)


def map_values_with_path(function: Callable[[Any, Any], Any], value: Any, path: Any = ()) -> Any:
    """Apply ``function(path, leaf)`` to the leaves of nested tuples, lists and dicts."""
    if type(value) in (tuple, list):
        return type(value)(map_values_with_path(function, v, (*path, ("item", i))) for i, v in enumerate(value))
    if type(value) is dict:
        return {key: map_values_with_path(function, v, (*path, ("item", key))) for key, v in value.items()}
    return function(path, value)


def without_memory(value: Any) -> Any:
    """Turn known numbers into plain ones."""
    if isinstance(value, torch.Size):
        return torch.Size([plain(item) for item in value])
    if isinstance(value, Known):
        return plain(value)
    if isinstance(value, (tuple, list, dict, slice)):
        return _kept_type(value)
    return value


def _kept_type(value: Any) -> Any:
    return map_values(without_memory, value) if type(value) in (tuple, list, dict, slice) else value


def parts_of(value: Any, path: Path = (), seen: frozenset[int] = frozenset()) -> Iterator[tuple[Path, Any]]:
    """List the parts of a result with the way to each: items by ``[key]``, fields and attributes by ``.name``."""
    steps: list[tuple[tuple[str, Any], Any]]
    if isinstance(value, (tuple, list)):
        steps = [(("item", index), item) for index, item in enumerate(value)]
    elif isinstance(value, dict):
        steps = [(("item", key), item) for key, item in value.items()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        steps = [(("field", f.name), getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif _is_plain_object(value) and id(value) not in seen:
        steps = [(("field", name), item) for name, item in vars(value).items()]
    else:
        yield path, value
        return
    for step, item in steps:
        yield from parts_of(item, (*path, step), seen | {id(value)})


def _is_plain_object(value: Any) -> bool:
    """Say whether ``value`` is an instance of a Python class that is all in its attributes."""
    return (
        hasattr(value, "__dict__")
        and not callable(value)
        and not isinstance(value, (type, torch.Tensor, torch.nn.Module))
        and type(value).__module__ not in ("builtins", "torch")
    )
