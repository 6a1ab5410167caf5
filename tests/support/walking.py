"""Walk through nested values, and find what capturing a model changed in it or left in it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = (torch.Tensor, torch.Size, torch.Generator, nn.Module, random.Random, np.ndarray, np.random.Generator)
_STAND_INS = (FakeTensor, fx.Proxy, fx.Node, torch.SymInt, torch.SymFloat, torch.SymBool)
_OF_TRACERS = ("torch.fx", "torch._subclasses", "torch._dynamo", "torch._functorch")
_MANY = 200_000


def leaves_of(value: Any, path: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Give every leaf of ``value`` with its path; objects of unknown classes are opened by their attributes."""
    parts = None if id(value) in seen else _parts_of(value)
    if parts is None:
        yield path, value
        return
    yield f"{path}:type", type(value)
    for key, part in parts:
        yield from leaves_of(part, f"{path}[{key!r}]", seen | {id(value)})


def _parts_of(value: Any) -> list[tuple[Any, Any]] | None:
    if value is None or isinstance(value, (*_PLAIN, str, bytes, int, float, complex, type)):
        return None
    if isinstance(value, dict):
        return [(key if isinstance(key, (str, int, tuple)) else index, value[key]) for index, key in enumerate(value)]
    if isinstance(value, (list, tuple, deque)):
        return list(enumerate(value))
    if isinstance(value, types.SimpleNamespace) or (dataclasses.is_dataclass(value) and hasattr(value, "__dict__")):
        return list(vars(value).items())
    home = type(value).__module__.partition(".")[0]
    if home in ("builtins", "torch", "functools", "itertools", "numpy", "_thread", "weakref", "types", "stagecut"):
        return None
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name)]
    found = [(name, getattr(value, name)) for name in slots if not name.startswith("__")]
    return found + list(vars(value).items()) if hasattr(value, "__dict__") else found or None


class Snapshot:
    """What a model was: every attribute of every module with its contents, and the random states."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before = self._look()

    def changes(self) -> list[str]:
        """List what is different now."""
        now = self._look()
        found = [f"{name} is gone" for name in self._before if name not in now]
        found += [f"{name} is new" for name in now if name not in self._before]
        for name, (value, content) in self._before.items():
            if name not in now:
                continue
            replaced = now[name][0] is not value and not _same(now[name][0], value)
            if replaced and (content is None or isinstance(value, torch.Tensor)):
                found.append(f"{name} is another object")
            elif not _same(now[name][1], content):
                found.append(f"{name} has other contents")
        return found

    def _look(self) -> dict[str, tuple[Any, Any]]:
        found: dict[str, tuple[Any, Any]] = {
            "torch's random state": (None, torch.get_rng_state()),
            "Python's random state": (None, random.getstate()),
            "numpy's random state": (None, np.random.get_state()[1:]),
            "the grad mode": (None, torch.is_grad_enabled()),
            "the default dtype": (None, torch.get_default_dtype()),
        }
        for path, module in self.model.named_modules():
            for name, value in leaves_of(module.__dict__, f"{path or 'model'}: "):
                found[name] = (value, _content(value))
        found |= {f"state {name}": (None, tensor.clone()) for name, tensor in self.model.state_dict().items()}
        found |= {f"gradient of {name}": (p.grad, None) for name, p in self.model.named_parameters()}
        return found


def _content(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.requires_grad, value.detach().clone(), len(value._backward_hooks or ())
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, itertools.count):
        return repr(value)
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a is b or bool(a == b)


def stand_ins_in(model: nn.Module) -> list[str]:
    """List the kinds of stand-ins for tensors that can be reached from a model, its hooks, functions and their caches.

    What can be reached is found as the garbage collector finds it, so that a cache of ``lru_cache`` is looked into too.
    Modules of Python are entered only where a class of the model comes from outside of torch.
    """
    homes = {type(module).__module__ for module in model.modules()}
    own = [vars(sys.modules[home]) for home in homes if home in sys.modules and not home.startswith("torch")]
    globals_of_others = {id(vars(module)) for module in list(sys.modules.values()) if hasattr(module, "__dict__")}
    waiting: deque[Any] = deque([model, *own])
    seen = globals_of_others | {id(part) for part in (sys.modules, sys)}
    found: set[str] = set()
    while waiting and len(seen) < _MANY:
        for value in gc.get_referents(waiting.popleft()):
            if id(value) in seen or isinstance(value, types.ModuleType):
                continue
            seen.add(id(value))
            home = type(value).__module__
            own_home = getattr(value, "__module__", None) if isinstance(value, (type, types.FunctionType)) else home
            is_tensor = isinstance(value, torch.Tensor)
            if isinstance(own_home, str) and own_home.partition(".")[0] == "stagecut":
                found.add(f"{own_home}.{getattr(value, '__name__', type(value).__name__)}")
            elif isinstance(value, _STAND_INS) or (is_tensor and home.startswith(_OF_TRACERS)):
                found.add(f"{home}.{type(value).__name__}")
            elif is_tensor and torch._C._functorch.is_functorch_wrapped_tensor(value):
                found.add("a tensor of torch.func")
            elif not isinstance(value, type) or value.__module__ in homes:
                waiting.append(value)
    return sorted(found)
