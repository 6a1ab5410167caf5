"""The tracer: torch.fx symbolic tracing that notices what it would otherwise bake in silently.

Plain symbolic tracing runs the model's Python once with stand-ins for tensors. What the Python does besides calling
torch is lost without a word: random numbers become constants, ``no_grad`` and autocast regions vanish, a custom
autograd function keeps its forward and loses its backward, counters count once. Each of these raises here, at the
module where it happens, so that this module can be kept whole as one opaque call.
"""

from __future__ import annotations

import copy
import operator
import os
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..structure import Structure, flatten, unflatten

SOURCE = "stagecut_source"
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_Content = tuple[str, Any, Any]  # attribute, container, copy of the container
_NOT_THE_MODEL = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, "<")


class TraceRefused(Exception):
    """Tracing met something that it cannot keep; ``reason`` is a phrase for the capture report."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _NothingReal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse real tensor work during tracing that must happen at every call instead."""

    def __init__(self, state: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise TraceRefused(f"random numbers are drawn outside of the graph ({func})")
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, torch.Tensor) and id(value) in self._state:
                    raise TraceRefused(f"a parameter or buffer is changed in place by Python code ({func})")
        return func(*args, **(kwargs or {}))


class _Proxy(fx.Proxy):
    """A stand-in that records ``x += y`` and ``x[i] = y`` as what they are: fx's own makes a new value, or refuses."""


def _record_in_place(method: str, function: Callable[..., Any]) -> None:
    def record(self: fx.Proxy, *operands: Any) -> fx.Proxy:
        proxy: fx.Proxy = self.tracer.create_proxy("call_function", function, (self, *operands), {})
        return proxy

    setattr(_Proxy, method, record)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    _record_in_place(f"__i{_name}__", getattr(operator, f"i{_name}"))
_record_in_place("__setitem__", operator.setitem)


class Tracer(fx.Tracer):
    """Trace a module with the modules at ``opaque`` paths kept as calls."""

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.proxy_buffer_attributes = True
        self.failed_at: str | None = None
        self._grad_enabled = torch.is_grad_enabled()
        self._autocast = _autocast_state()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Stand in for the value of ``node``."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep torch's own layers whole, but open its containers, so that they can be cut."""
        if module_qualified_name in self.opaque or isinstance(m, torch.jit.ScriptModule):
            return True
        if not m.__module__.startswith(("torch.nn.modules", "torch.ao.nn")):
            return False
        is_container = any(True for _ in m.children()) and not isinstance(m, nn.MultiheadAttention)
        return not is_container

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into ``m`` or keep it; remember the innermost module in which tracing failed."""
        path = self.path_of_module(m)
        try:
            if self.is_leaf_module(m, path):
                return super().call_module(m, forward, args, kwargs)
            _refuse_backward_hooks(m)
            with unchanged(m):
                return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_at is None:
                self.failed_at = path
            raise

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a node, unless a region that the graph cannot express is active."""
        if torch.is_grad_enabled() != self._grad_enabled:
            raise TraceRefused("it runs under its own grad mode (torch.no_grad or torch.enable_grad)")
        if _autocast_state() != self._autocast:
            raise TraceRefused("it runs under its own autocast region")
        node = super().create_node(*args, **kwargs)
        node.meta[SOURCE] = _calling_line()
        return node

    def trace_call(
        self, model: nn.Module, structure: Structure, names: list[str | None], constants: list[Any]
    ) -> tuple[fx.Graph, Structure]:
        """Trace ``model`` for arguments of ``structure``; returns the graph and the structure of the result.

        ``names[i]`` is the placeholder of a tensor leaf, or None where the leaf is ``constants[i]``. The graph's output
        is the flat list of the result's leaves.
        """
        self._structure, self._names, self._constants = structure, names, constants
        self._call = nn.Module.__call__
        state = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        with _no_custom_autograd(), _NothingReal(state):
            graph = self.trace(model)
        return graph, self._output_structure

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Replace fx's handling of arguments: stand-ins for tensor leaves, the rest as it was given."""
        leaves = [
            constant if name is None else self.create_proxy("placeholder", name, (), {})
            for name, constant in zip(self._names, self._constants)
        ]
        args, kwargs = unflatten(self._structure, leaves)

        def run() -> list[Any]:
            assert isinstance(self.root, nn.Module)
            _refuse_backward_hooks(self.root)
            with unchanged(self.root):
                output = self._call(self.root, *args, **kwargs)
            flat, self._output_structure = flatten(output)
            return flat

        return run, []


def _calling_line() -> str | None:
    """Find the innermost line of the model's own code.

    fx can record stack traces itself, but asking for one imports torch.compile's stack, which takes seconds.
    """
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_NOT_THE_MODEL):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _refuse_backward_hooks(module: nn.Module) -> None:
    if module._backward_hooks or module._backward_pre_hooks:
        raise TraceRefused("it has backward hooks, which a trace through it would lose")


def _autocast_state() -> tuple[Any, ...]:
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Refuse a forward that changes the module's own attributes or draws Python's random numbers; undo the change."""
    contents = _contents_of(module)
    drawn = random.getstate()
    drawn_by_numpy = np.random.get_state()
    try:
        yield
        changed = _changed_attribute(contents)
        if changed is not None:
            raise TraceRefused(f"its forward changes its own attribute {changed!r}")
        if random.getstate() != drawn:
            raise TraceRefused("its forward draws random numbers from Python's random module")
        if any(not np.array_equal(a, b) for a, b in zip(drawn_by_numpy, np.random.get_state())):
            raise TraceRefused("its forward draws random numbers from numpy")
    except Exception:
        _put_back(contents)
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        raise


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, with what they held: a run of the model may count, cache or append."""
    contents = [entry for module in model.modules() for entry in _contents_of(module)]
    try:
        yield
    finally:
        _put_back(contents)


def _contents_of(module: nn.Module) -> list[_Content]:
    """Copy the module's attributes and, at any depth, what its lists, dictionaries and sets hold."""
    found: list[_Content] = []
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", module.__dict__)]
    while waiting:
        name, value = waiting.pop()
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            found.append((name, value, copy.copy(value)))
            if isinstance(value, dict):
                waiting += [(name or str(key), item) for key, item in value.items()]
            else:
                waiting += [(name, item) for item in value]
    return found


def _put_back(contents: list[_Content]) -> None:
    for _, container, before in contents:
        if not _is_same(container, before):
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(before)


def _is_same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in before.items())
    if isinstance(container, set):
        return bool(container == before)
    return all(a is b for a, b in zip(container, before))


def _changed_attribute(contents: list[_Content]) -> str | None:
    """Name an attribute or buffer that is another object, or holds other objects, than before."""
    for name, container, before in contents:
        if not _is_same(container, before):
            if name not in ("", "_buffers", "_parameters", "_modules"):
                return name
            keys = [*before, *(key for key in container if key not in before)]
            return str(next(key for key in keys if container.get(key) is not before.get(key)))
    return None


@contextmanager
def _no_custom_autograd() -> Iterator[None]:
    """Refuse custom autograd functions: a trace through one keeps its forward and loses its backward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        raise TraceRefused(f"it uses the custom autograd function {cls.__name__}")

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
