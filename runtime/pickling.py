"""Pickles between a parent and its own workers: the model's state by name, other tensors by value.

Only bytes that the parent or one of its workers wrote to their private socket are ever unpickled.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import cloudpickle
import torch


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, with tensors as their own bytes.

    torch's own pickling keeps the whole storage under a view, which would send the batch once per microbatch.
    """

    def __init__(self, file: io.BytesIO, names: dict[int, str]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = names

    def persistent_id(self, obj: Any) -> str | None:
        return self._names.get(id(obj)) if isinstance(obj, torch.Tensor) else None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor and obj.device.type == "cpu" and obj.layout is torch.strided and obj.is_leaf:
            return _rebuild, _parts(obj)
        if isinstance(obj, BaseException) and type(obj).__reduce__ is BaseException.__reduce__:
            return _rebuild_exception, (type(obj), obj.args, obj.__dict__)
        return super().reducer_override(obj)


def _parts(tensor: torch.Tensor) -> tuple[Any, ...]:
    dense = torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor).detach()
    flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    data = pickle.PickleBuffer(flat.numpy())  # type: ignore[arg-type]
    return data, tensor.dtype, tuple(tensor.shape), dense.stride(), tensor.requires_grad


def _rebuild(
    data: Any, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], requires_grad: bool
) -> torch.Tensor:
    if 0 in shape:
        tensor = torch.empty(shape, dtype=dtype)
    else:
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).as_strided(shape, strides)
    return tensor.requires_grad_(requires_grad)


def _rebuild_exception(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    """Rebuild an exception without calling its ``__init__``, which may want other arguments than the stored ones."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, state: dict[str, torch.Tensor]) -> None:
        super().__init__(file)
        self._state = state

    def persistent_load(self, pid: str) -> torch.Tensor:
        return self._state[pid]


def dumps(value: Any, names: dict[int, str] | None = None) -> bytes:
    """Pickle ``value``; tensors whose ``id`` is in ``names`` become references to the model's state."""
    file = io.BytesIO()
    _Pickler(file, names or {}).dump(value)
    return file.getvalue()


def loads(data: bytes, state: dict[str, torch.Tensor] | None = None) -> Any:
    """Unpickle what :func:`dumps` made, with ``state`` in place of the references."""
    return _Unpickler(io.BytesIO(data), state or {}).load()
