"""Pickles between a parent and its own workers: the model's state by name, other tensors by value or in a mailbox.

Tensors of accelerators travel as tensors of the CPU. Only bytes that the parent or one of its workers wrote to their
private socket are ever unpickled.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import cloudpickle
import torch

from .mailbox import LARGE_BYTES, Letter, Mailbox


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, with tensors as their own bytes.

    torch's own pickling keeps the whole storage under a view, which would send the batch once per microbatch.
    """

    def __init__(self, file: io.BytesIO, names: dict[int, str], mailbox: Mailbox | None) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = names
        self._mailbox = mailbox
        self._posted: dict[int, tuple[torch.Tensor, Letter]] = {}

    def persistent_id(self, obj: Any) -> str | Letter | None:
        if not isinstance(obj, torch.Tensor):
            return None
        if self._mailbox is None or not _is_plain(obj) or obj.numel() * obj.element_size() < LARGE_BYTES:
            return self._names.get(id(obj))
        if id(obj) not in self._posted:
            self._posted[id(obj)] = obj, self._mailbox.put(obj.cpu())
        return self._posted[id(obj)][1]

    def reducer_override(self, obj: Any) -> Any:
        if _is_plain(obj):
            return _rebuild, _parts(obj.cpu())
        if isinstance(obj, BaseException) and type(obj).__reduce__ is BaseException.__reduce__:
            return _rebuild_exception, (type(obj), obj.args, obj.__dict__)
        return super().reducer_override(obj)


def _is_plain(obj: Any) -> bool:
    if type(obj) is not torch.Tensor:
        return False
    return obj.device.type != "meta" and obj.layout is torch.strided and obj.is_leaf


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
    def __init__(self, file: io.BytesIO, state: dict[str, torch.Tensor], mailbox: Mailbox | None) -> None:
        super().__init__(file)
        self._state = state
        self._mailbox = mailbox
        self._taken: dict[Letter, torch.Tensor] = {}

    def persistent_load(self, pid: str | Letter) -> torch.Tensor:
        if isinstance(pid, str):
            return self._state[pid]
        assert self._mailbox is not None, "who writes to a mailbox and who reads from it agree on it"
        if pid not in self._taken:
            self._taken[pid] = self._mailbox.get(pid)
        return self._taken[pid]


def dumps(value: Any, names: dict[int, str] | None = None, mailbox: Mailbox | None = None) -> bytes:
    """Pickle ``value``; tensors whose ``id`` is in ``names`` become references to the model's state.

    With a ``mailbox`` large tensors go there, over those of the message before, and the pickle says where they lie.
    """
    if mailbox is not None:
        mailbox.start()
    file = io.BytesIO()
    _Pickler(file, names or {}, mailbox).dump(value)
    return file.getvalue()


def loads(data: bytes, state: dict[str, torch.Tensor] | None = None, mailbox: Mailbox | None = None) -> Any:
    """Unpickle what :func:`dumps` made, with ``state`` in place of the references, and copies out of the mailbox."""
    return _Unpickler(io.BytesIO(data), state or {}, mailbox).load()
