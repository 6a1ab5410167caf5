"""What runs below autograd, counted: arithmetic by dtype, traffic, memory, randomness, in-place writes."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .flops import op_flops

_RUNNING = ("running_mean", "running_var")
_NO_WORK = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


class Kernel(NamedTuple):
    """One aten op that computes: its arithmetic in ``dtype``, and the bytes that it reads and writes."""

    flops: int
    dtype: torch.dtype
    moved_bytes: int


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count arithmetic, traffic, randomness and in-place writes of what runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reset()

    def reset(self) -> None:
        """Start counting from zero."""
        self.kernels: list[Kernel] = []
        self.random = False
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.random |= torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args, kwargs)
        inputs, outputs = _tensors_in(args, kwargs), _tensors_in(result)
        self._note_writes(func, args, kwargs)
        if _is_kernel(func) and outputs:
            moved_bytes = sum(bytes_of(tensor) for tensor in (*inputs, *outputs))
            flops = op_flops(func, args, kwargs, result)
            self.kernels.append(Kernel(flops, _dtype(inputs, outputs), moved_bytes))
        return result

    def _note_writes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = {a.name: value for a, value in zip(func._schema.arguments, args)} | kwargs
        # Batch norms write their running statistics, and their schemas do not say so.
        hidden = _RUNNING if given.get("training") is True else ()
        for argument in func._schema.arguments:
            declared = argument.alias_info is not None and argument.alias_info.is_write
            if declared or argument.name in hidden:
                self.written.update(storage_of(tensor) for tensor in _tensors_in(given.get(argument.name)))


class MemoryMeter(Meter):  # type: ignore[no-untyped-call]
    """Count also the bytes of storages that what runs makes: those alive now, and the most that were alive at once.

    Fake tensors will do: a storage without memory dies when the last tensor that uses it does. What a kernel allocates
    for itself is not seen.
    """

    def reset(self) -> None:
        """Start counting from zero; storages that are there already are not counted."""
        super().reset()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = {storage_of(tensor) for tensor in _tensors_in(args, kwargs)}
        for tensor in _tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._follow(storage)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        alive, key, n_bytes = self._alive, int(storage._cdata), storage.nbytes()

        def died(_: object) -> None:
            del alive[key]
            if alive is self._alive:  # not of what ran before the last reset
                self.live_bytes -= n_bytes

        alive[key] = weakref.ref(storage, died)
        self.live_bytes += n_bytes


def _tensors_in(*values: Any) -> list[torch.Tensor]:
    """List the tensors among an aten op's arguments or results: tensors, lists and dicts of them, nothing else.

    torch's pytree would do it too, and would keep them alive until the next garbage collection: its helper function
    refers to itself, and through ``is_leaf`` to what is flattened.
    """
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors_in(*value)
        elif isinstance(value, dict):
            found += _tensors_in(*value.values())
    return found


def _drops_nothing(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether an op that may draw random numbers is told not to: attention without dropout, for one."""
    given = {a.name: a.default_value for a in func._schema.arguments} | kwargs
    given |= {a.name: value for a, value in zip(func._schema.arguments, args)}
    return bool(given.get("dropout_p", 1.0) == 0.0)


def _is_kernel(func: Any) -> bool:
    """Say whether an op computes: it is no view, no bare allocation and no question about a tensor."""
    view = any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns)
    return not view and func.namespace != "prim" and func._overloadpacket.__name__ not in _NO_WORK


def _dtype(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> torch.dtype:
    """Return the dtype that an op multiplies in: that of its first tensor of continuous numbers."""
    tensors = [*inputs, *outputs]
    return next((t.dtype for t in tensors if t.is_floating_point() or t.is_complex()), tensors[0].dtype)


def bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def storage_of(tensor: torch.Tensor) -> int:
    """Identify the memory that ``tensor`` lies in, fake or real."""
    return int(tensor.untyped_storage()._cdata)
