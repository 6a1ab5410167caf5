"""Nested arguments and results as a flat list of leaves plus a picklable description of the nesting."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree


@dataclass(frozen=True)
class Structure:
    """The nesting of a value: a leaf, a container that torch's pytree knows, or a plain dataclass.

    torch's pytree flattens tuples, lists, dicts, named tuples and whatever libraries registered (Hugging Face's
    ``ModelOutput``); dataclasses that nobody registered are opened here, field by field, and so are instances of plain
    Python classes with tensors among their attributes (a cache of keys and values, a batch of a graph library).
    """

    kind: str
    context: Any = None
    children: tuple[Structure, ...] = ()

    @property
    def n_leaves(self) -> int:
        """Count the leaves below this node."""
        return 1 if self.kind == "leaf" else sum(child.n_leaves for child in self.children)


LEAF = Structure("leaf")


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """Split ``value`` into its leaves, in order, and its structure.

    >>> leaves, structure = flatten({"a": 1, "b": (2, None)})
    >>> leaves
    [1, 2, None]
    >>> unflatten(structure, leaves)
    {'a': 1, 'b': (2, None)}
    """
    leaves: list[Any] = []
    return leaves, _open(value, leaves)


def unflatten(structure: Structure, leaves: Sequence[Any]) -> Any:
    """Rebuild a value of ``structure`` from its leaves (the inverse of :func:`flatten`)."""
    if len(leaves) != structure.n_leaves:
        raise ValueError(f"structure has {structure.n_leaves} leaves, got {len(leaves)}")
    return _close(structure, iter(leaves))


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to every leaf of ``value`` and keep its structure."""
    leaves, structure = flatten(value)
    return unflatten(structure, [function(leaf) for leaf in leaves])


def tensors_in(value: Any) -> list[torch.Tensor]:
    """List the tensors among the leaves of ``value``."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _open(value: Any, leaves: list[Any]) -> Structure:
    # torch's pytree would open a torch.Size and close it as a tuple.
    if value is None or isinstance(value, (torch.Tensor, torch.Size, int, float, str)):
        leaves.append(value)
        return LEAF
    # tree_flatten leaves a reference cycle with is_leaf in it: emptied, it does not keep tensors until it is collected.
    itself = [value]
    items, spec = _pytree.tree_flatten(value, is_leaf=lambda item: item is not itself[0])
    itself.clear()
    if len(items) != 1 or items[0] is not value:
        return Structure("pytree", spec, tuple(_open(item, leaves) for item in items))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(field.name for field in dataclasses.fields(value) if field.init)
        children = tuple(_open(getattr(value, name), leaves) for name in names)
        return Structure("dataclass", (type(value), names), children)
    if _holds_tensors(value):
        names = tuple(vars(value))
        return Structure("object", (type(value), names), tuple(_open(vars(value)[name], leaves) for name in names))
    leaves.append(value)
    return LEAF


def _holds_tensors(value: Any, depth: int = 4) -> bool:
    """Say whether an instance of a Python class has tensors among its attributes, at most ``depth`` levels down."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0:
        return False
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(item, depth - 1) for item in value)
    if isinstance(value, dict):
        return any(_holds_tensors(item, depth - 1) for item in value.values())
    if not _is_plain_object(value):
        return False
    return any(_holds_tensors(item, depth - 1) for item in vars(value).values())


def _is_plain_object(value: Any) -> bool:
    kind = type(value)
    if callable(value) or isinstance(value, (type, torch.nn.Module)) or not hasattr(value, "__dict__"):
        return False
    return (
        kind.__module__.partition(".")[0] not in ("builtins", "torch", "numpy") and vars(kind).get("__reduce__") is None
    )


def _close(structure: Structure, leaves: Any) -> Any:
    if structure.kind == "leaf":
        return next(leaves)
    children = [_close(child, leaves) for child in structure.children]
    if structure.kind == "pytree":
        return _pytree.tree_unflatten(children, structure.context)
    kind, names = structure.context
    if structure.kind == "object":
        made = kind.__new__(kind)
        made.__dict__.update(zip(names, children))
        return made
    return kind(**dict(zip(names, children)))


def is_encodable(value: Any) -> bool:
    """Say whether ``value`` can travel: tensors, numbers, strings, None, and tuples, lists, dicts of them."""
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, str, torch.dtype, torch.device)):
        return not (isinstance(value, torch.Tensor) and value.layout is not torch.strided)
    if type(value) in (tuple, list, torch.Size):
        return all(is_encodable(item) for item in value)
    return type(value) is dict and all(type(key) is str and is_encodable(item) for key, item in value.items())


def call_leaves(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], Structure]:
    """Flatten a call's arguments the same way however they were written: ``f(x, mask=m)`` equals ``f(x, m)``.

    Raises:
        TypeError: the arguments do not fit the signature of ``forward``.
    """
    bound = _bound(forward, args, kwargs)
    return flatten((bound.args, bound.kwargs))


def leaf_paths(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Name every leaf of a call by its argument, with a running number where an argument has several."""
    bound = _bound(forward, args, kwargs)
    names: list[str] = []
    for name, value in [*_positional(bound), *bound.kwargs.items()]:
        count = flatten(value)[1].n_leaves
        names += [name] if count == 1 else [f"{name}_{index}" for index in range(count)]
    return names


def _bound(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """Bind a call; what ``**kwargs`` takes is in the order of its names, not in the order in which it was written."""
    return inspect.signature(forward).bind(*args, **dict(sorted(kwargs.items())))


def _positional(bound: inspect.BoundArguments) -> list[tuple[str, Any]]:
    named: list[tuple[str, Any]] = []
    for name, parameter in bound.signature.parameters.items():
        if name not in bound.arguments or len(named) == len(bound.args):
            continue
        value = bound.arguments[name]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            named += [(f"{name}_{index}", item) for index, item in enumerate(value)]
        elif parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            named.append((name, value))
    return named
