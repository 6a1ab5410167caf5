"""Tensors that only constants and sizes decide: their data can be read while a model is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from ...runtime.program.calls import ApplyFunction, KeptFunction, Scripted
from . import functions
from .calls import Call, map_values, without_memory
from .numbers import Expr, Ref

_MOST_CALLS = 200
_UNSEEN = (KeptFunction, ApplyFunction, Scripted)  # they may draw numbers that torch does not see
_STEPS = {"item": lambda value, key: value[key], "field": getattr}


class _Depends(Exception):
    """On data, on parameters or on random numbers."""


class _Deterministic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.name():
            raise _Depends
        return func(*args, **(kwargs or {}))


def settled_value(calls: Sequence[Call], ref: Ref) -> torch.Tensor | None:
    """Compute the tensor that ``ref`` stands for from the calls that led to it; None where sizes do not settle it."""
    try:
        needed = _needed(calls, ref)
        with unset_fake_temporarily(), torch.no_grad(), _Deterministic():
            values: dict[int, Any] = {}
            for index in sorted(needed):
                values[index] = _computed(calls[index], values)
            value = _part(values[ref.index], ref)
            return value if isinstance(value, torch.Tensor) else None
    except Exception:  # what cannot be computed here is not settled
        return None


def _needed(calls: Sequence[Call], ref: Ref) -> set[int]:
    needed: set[int] = set()
    waiting = [ref.index]
    while waiting:
        index = waiting.pop()
        if index in needed:
            continue
        needed.add(index)
        if len(needed) > _MOST_CALLS:
            raise _Depends
        call = calls[index]
        if call.op not in ("call_function", "call_method") or call.region.autocast or call.region.cudnn is not None:
            raise _Depends
        if isinstance(call.target, _UNSEEN):
            raise _Depends
        waiting += _used(call)
    if any(_writes(call) and needed.intersection(_used(call)) for call in calls):
        raise _Depends
    return needed


def _used(call: Call) -> list[int]:
    """List the calls whose values are used, other than for their sizes."""
    found: list[int] = []
    map_values(lambda leaf: found.append(leaf.index) if isinstance(leaf, Ref) else None, [call.args, call.kwargs])
    return found


def _writes(call: Call) -> bool:
    name = call.target if isinstance(call.target, str) else getattr(call.target, "__name__", "")
    return functions.changes_in_place(name, call.kwargs) or name in ("setitem", "__setitem__")


def _computed(call: Call, values: dict[int, Any]) -> Any:
    def value(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return _part(values[leaf.index], leaf)
        if isinstance(leaf, Expr):
            raise _Depends
        return without_memory(leaf)

    args, kwargs = map_values(value, tuple(call.args)), map_values(value, dict(call.kwargs))
    return (
        getattr(args[0], call.target)(*args[1:], **kwargs) if call.op == "call_method" else call.target(*args, **kwargs)
    )


def _part(value: Any, ref: Ref) -> Any:
    for kind, key in ref.path:
        value = _STEPS[kind](value, key)
    return value
