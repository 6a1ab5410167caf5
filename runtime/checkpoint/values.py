"""Values of Python as JSON and back: what state dicts hold, and nothing that is executed."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from typing import Any

import torch

from ...errors import CheckpointError

_KIND = "kind"
_SMALL = 1024  # numbers as text; schedulers keep learning rates in tensors
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)}


def encoded(value: Any, path: str) -> Any:
    """Write a value as JSON: scalars and lists as they are, the rest as objects that say what they are.

    >>> encoded({"betas": (0.9, 0.999)}, "group")
    {'kind': 'dict', 'items': [['betas', {'kind': 'tuple', 'items': [0.9, 0.999]}]]}

    Raises:
        CheckpointError: it holds something else, which only pickle could keep; the message has the path to it.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_KIND: "float", "text": repr(value)}
    if type(value) is list:
        return [encoded(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if type(value) is tuple:
        return {_KIND: "tuple", "items": [encoded(item, f"{path}[{index}]") for index, item in enumerate(value)]}
    for kind, made in (("dict", dict), ("ordered", OrderedDict), ("counter", Counter)):
        if type(value) is made:
            items = [[encoded(key, path), encoded(item, f"{path}.{key}")] for key, item in value.items()]
            return {_KIND: kind, "items": items}
    if isinstance(value, torch.Tensor) and value.numel() <= _SMALL and str(value.dtype) in _DTYPES:
        numbers = encoded(value.detach().cpu().flatten().tolist(), path)
        return {_KIND: "tensor", "dtype": str(value.dtype), "shape": list(value.shape), "items": numbers}
    raise CheckpointError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold",
        hint="numbers, text, None, small tensors, and lists, tuples, dicts of them; large tensors go into the model",
    )


def decoded(value: Any) -> Any:
    """Read what :func:`encoded` wrote.

    >>> decoded(encoded({1: (2, [None, float("inf")])}, "x"))
    {1: (2, [None, inf])}

    Raises:
        CheckpointError: nothing that it wrote looks like this.
    """
    try:
        return _decoded(value)
    except RecursionError as error:
        raise CheckpointError(f"a checkpoint's values are nested too deeply: {error}") from error


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, items = str(value.get(_KIND)), value.get("items")
    if kind == "float" and value.get("text") in ("inf", "-inf", "nan"):
        return float(value["text"])
    dtype = _DTYPES.get(str(value.get("dtype")))
    if kind == "tensor" and dtype is not None and isinstance(items, list):
        return _tensor([_decoded(item) for item in items], dtype, value.get("shape"))
    if kind == "tuple" and isinstance(items, list):
        return tuple(_decoded(item) for item in items)
    makers: dict[str, Any] = {"dict": dict, "ordered": OrderedDict, "counter": _counter}
    if kind in makers and isinstance(items, list) and all(isinstance(i, list) and len(i) == 2 for i in items):
        try:
            return makers[kind]([(_decoded(key), _decoded(item)) for key, item in items])
        except TypeError as error:
            raise CheckpointError(f"a checkpoint's values have a key that cannot be one: {error}") from error
    raise CheckpointError(f"a checkpoint's values hold a {kind!r} that this version does not know")


def _counter(items: list[tuple[Any, Any]]) -> Counter[Any]:
    return Counter(dict(items))


def _tensor(numbers: list[Any], dtype: torch.dtype, shape: Any) -> torch.Tensor:
    try:
        return torch.tensor(numbers, dtype=dtype).reshape(shape)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"a checkpoint's values hold a tensor that is none: {error}") from error
