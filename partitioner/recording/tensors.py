"""Tensors as a recording knows them: the model's own by name, those that came to be, their storages and versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import parts_of


class ModelState:
    """What a recording must recognise of a model: modules, parameters, buffers and tensor attributes by identity."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self.paths.setdefault(id(module), path)
        self.tensors: dict[int, tuple[str, torch.Tensor]] = {}
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        for name, tensor in (*named, *_attributes(model)):
            self.tensors.setdefault(id(tensor), (name, tensor))


def _attributes(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}".removeprefix("."), value


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remember which tensors came to be during a recording, so that none of them passes for a constant."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            storage = storage_of(item)
            if storage is not None:
                self.storages.add(storage._cdata)
                self._alive.append(storage)
        return result


@contextmanager
def swapped_state(module: nn.Module, stand_in: Callable[[torch.Tensor], Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Give a module, and what is inside it, stand-ins for parameters and buffers for a while; yields them by name."""
    state: dict[str, torch.Tensor] = {}
    kept: list[tuple[nn.Module, str, Any]] = []
    for path, inner in module.named_modules():
        if isinstance(inner, torch.jit.ScriptModule):
            continue
        for kind in ("_parameters", "_buffers"):
            own = inner.__dict__[kind]
            swapped = {name: None if tensor is None else stand_in(tensor) for name, tensor in own.items()}
            state.update((f"{path}.{name}".removeprefix("."), t) for name, t in swapped.items() if t is not None)
            kept.append((inner, kind, own))
            inner.__dict__[kind] = swapped
    try:
        yield state
    finally:
        for inner, kind, own in kept:
            inner.__dict__[kind] = own


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Give the same values another identity: what a call returns is not what it was given, even if it is today."""
    return tensor.view_as(tensor)


def storage_of(value: Any) -> Any:
    """Return the storage of a tensor that has one: those of ``torch.func`` transforms have none."""
    try:
        return value.untyped_storage() if isinstance(value, torch.Tensor) else None
    except (NotImplementedError, RuntimeError):
        return None


def versions_of(args: Any, kwargs: Any) -> dict[int, int]:
    leaves = [leaf for value in (args, kwargs) for _, leaf in parts_of(value)]
    return {id(leaf): leaf._version for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_inference()}
