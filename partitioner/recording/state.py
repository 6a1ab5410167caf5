"""What a model's forward may change besides tensors: noticed while it happens, and undone after a capture."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ...randomness import kept_random_state

_CONTAINERS = (list, dict, set, deque)
_BASES: tuple[Any, ...] = _CONTAINERS
_ORDERED = OrderedDict.__iter__
_ITERATORS = (itertools.count, itertools.cycle)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = ("torch", "numpy", "builtins", "sympy", "functools", "typing")
CHANGES_ITSELF = "its forward changes its own attribute"
_Content = tuple[str, Any, Any]  # attribute, container, copy of the container


class TraceRefused(BaseException):
    """Recording met something that it cannot keep; ``reason`` is a phrase for the capture report.

    Not an :class:`Exception`: the model's own ``except Exception`` must not swallow it.
    """

    def __init__(self, reason: str, source: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.source = source


@contextmanager
def own_random_state() -> Iterator[None]:
    """Leave the process's random state as it was."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with kept_random_state():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave the attributes of the model's modules and the process's random state as they were."""
    with own_random_state(), put_back(model):
        yield


@contextmanager
def unchanged(module: nn.Module, same: dict[int, Any] | None = None) -> Iterator[None]:
    """Refuse a forward that changes the module's own attributes or draws random numbers outside torch; undo it.

    ``same`` maps the identity of stand-ins to what the model itself would hold in their place.
    """
    contents = contents_of(module)
    drawn, drawn_by_numpy, seed = random.getstate(), np.random.get_state(), torch.initial_seed()
    try:
        yield
        changed = changed_attribute(contents, same or {})
        if changed is not None:
            raise TraceRefused(f"{CHANGES_ITSELF} {changed!r}")
        if random.getstate() != drawn:
            raise TraceRefused("its forward draws random numbers from Python's random module")
        if any(not np.array_equal(a, b) for a, b in zip(drawn_by_numpy, np.random.get_state())):
            raise TraceRefused("its forward draws random numbers from numpy")
        restore(contents)
        if torch.initial_seed() != seed:
            raise TraceRefused("its forward seeds torch's random numbers")
    except BaseException:
        restore(contents)
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        raise


@contextmanager
def put_back(model: nn.Module, caches: Sequence[Any] | None = None) -> Iterator[None]:
    """Give every module its attributes back, with what they held: a run of the model may count, cache or append.

    So are the containers that forward hooks close over, the globals and class attributes of the files that define the
    modules, the states of random generators that modules hold, and results kept by ``functools.lru_cache``: in
    ``caches``, or anywhere.
    """
    modules = list(model.modules())
    contents = [entry for module in modules for entry in contents_of(module)]
    contents += [entry for scope in _scopes(modules) for entry in _containers_in(scope)]
    contents += [entry for module in modules for hook in _hooks_of(module) for entry in _closed_over(hook)]
    generators = [(item, _state_of(item)) for module in modules for item in vars(module).values() if _draws(item)]
    iterators = [(module, key, item, _fork(item)) for module in modules for key, item in vars(module).items()
                 if isinstance(item, _ITERATORS)]  # fmt: skip
    try:
        with emptied(all_caches() if caches is None else caches):
            yield
    finally:
        restore(contents)
        for module, key, item, before in iterators:
            if repr(item) != repr(before):
                vars(module)[key] = before
        for generator, state in generators:
            _set_state(generator, state)


@contextmanager
def emptied(caches: Sequence[Any]) -> Iterator[None]:
    """Empty the caches that results are added to."""
    known = [(cache, cache.cache_info().misses) for cache in caches]
    try:
        yield
    finally:
        for cache, misses in known:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def contents_of(module: nn.Module) -> list[_Content]:
    """Copy the module's attributes and, at any depth, what its lists, dictionaries and sets hold."""
    return _containers_in(module.__dict__)


def _containers_in(root: Any) -> list[_Content]:
    found: list[_Content] = []
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        name, value = waiting.pop()
        if _is_container(value) and id(value) not in seen:
            seen.add(id(value))
            found.append((name, value, _items(value)))
            if isinstance(value, dict):
                waiting += [(name or str(key), item) for key, item in value.items() if _is_container(item)]
            else:
                waiting += [(name, item) for item in value if _is_container(item)]
    return found


def _is_container(value: Any) -> bool:
    """Say whether a value is a list, dictionary, set or deque; one that looks things up in its own way is none."""
    for base in _BASES:
        if isinstance(value, base):
            own: Any = type(value)
            return base is set or (own.__getitem__ is base.__getitem__ and own.__iter__ in (base.__iter__, _ORDERED))
    return False


def _items(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def contents_of_object(value: Any) -> list[_Content]:
    """Copy what a container, or an object by its attributes, holds."""
    return _containers_in(value if _is_container(value) else getattr(value, "__dict__", None))


def _scopes(modules: list[nn.Module]) -> list[dict[str, Any]]:
    """List the global names of the files that the modules' classes come from, and the classes' attributes."""
    classes = {cls for module in modules for cls in type(module).__mro__ if not _of_library(cls.__module__)}
    files = {sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules}
    scopes: list[dict[str, Any]] = [vars(file) for file in files]
    scopes += [{k: v for k, v in vars(cls).items() if _is_container(v)} for cls in classes]
    return scopes


def _of_library(name: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES


def _hooks_of(module: nn.Module) -> list[Any]:
    return [hook for kind in _HOOKS for hook in getattr(module, kind, {}).values()]


def _closed_over(hook: Any) -> list[_Content]:
    """Copy the containers that a hook can reach: closure, defaults, bound object, partial arguments."""
    reached: list[Any] = []
    if isinstance(hook, functools.partial):
        reached += [*hook.args, *hook.keywords.values()]
        hook = hook.func
    if isinstance(hook, types.MethodType):
        reached.append(getattr(hook.__self__, "__dict__", None))
        hook = hook.__func__
    elif not isinstance(hook, types.FunctionType):
        reached.append(getattr(hook, "__dict__", None))
    for cell in getattr(hook, "__closure__", None) or ():
        try:
            reached += [cell.cell_contents, getattr(cell.cell_contents, "__dict__", None)]
        except ValueError:  # an empty cell
            continue
    names = getattr(getattr(hook, "__code__", None), "co_names", ())
    reached += [hook.__globals__[name] for name in names if name in hook.__globals__]
    reached += list(getattr(hook, "__defaults__", None) or ())
    return [entry for value in reached for entry in _containers_in(value)]


def hook_contents(module: nn.Module) -> list[_Content]:
    """Copy what the module's own forward hooks may write to."""
    return [entry for hook in _hooks_of(module) for entry in _closed_over(hook)]


def _fork(iterator: Any) -> Any:
    return copy.copy(iterator)


def _draws(item: Any) -> bool:
    return isinstance(item, (random.Random, np.random.Generator, np.random.RandomState, torch.Generator))


def _state_of(item: Any) -> Any:
    if isinstance(item, np.random.Generator):
        return copy.deepcopy(item.bit_generator.state)
    return item.get_state() if isinstance(item, (torch.Generator, np.random.RandomState)) else item.getstate()


def _set_state(item: Any, state: Any) -> None:
    if isinstance(item, np.random.Generator):
        item.bit_generator.state = state
    elif isinstance(item, (torch.Generator, np.random.RandomState)):
        item.set_state(state)
    else:
        item.setstate(state)


_found: dict[int, list[Any]] | None = None  # by how many modules are imported; None outside of a search that is shared


@contextmanager
def caches_found_once() -> Iterator[None]:
    """Let :func:`all_caches` look at all objects of the process, a tenth of a second, once for the outermost body.

    And again where the body imports something, which may bring caches along.
    """
    global _found
    before = _found
    _found = {} if before is None else before
    try:
        yield
    finally:
        _found = before


def all_caches() -> list[Any]:
    """Find the ``functools.lru_cache`` functions of all code but torch's and its like."""
    if _found is not None and len(sys.modules) in _found:
        return _found[len(sys.modules)]
    kind = type(functools.lru_cache(lambda: None))
    found = [item for item in gc.get_objects() if type(item) is kind]
    caches = [cache for cache in found if not _of_library(getattr(cache, "__module__", None) or "builtins")]
    if _found is not None:
        _found[len(sys.modules)] = caches
    return caches


def restore(contents: list[_Content]) -> None:
    """Let every container hold again what it held when it was copied."""
    for _, container, before in contents:
        if _is_same(container, before):
            continue
        if isinstance(container, dict):
            for key in [key for key in container if key not in before]:
                del container[key]
            container.update(before)
        else:
            container.clear()
            (container.update if isinstance(container, set) else container.extend)(before)


def _is_same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in before.items())
    if isinstance(container, set):
        return bool(container == before)
    return all(a is b for a, b in zip(container, before))


def new_values(contents: list[_Content]) -> list[Any]:
    """List what containers hold that they did not hold when they were copied."""
    found: list[Any] = []
    for _, container, before in contents:
        items, old = ((c.values() if isinstance(c, dict) else c) for c in (container, before))
        known = {id(item) for item in old}
        found += [item for item in items if id(item) not in known]
    return found


def changed_attribute(contents: list[_Content], same: dict[int, Any] | None = None) -> str | None:
    """Name an attribute or buffer that is another object, or holds other objects, than before."""
    for name, container, before in contents:
        if same and isinstance(container, dict):
            container = {key: same.get(id(value), value) for key, value in container.items()}
        if not _is_same(container, before):
            if name not in ("", "_buffers", "_parameters", "_modules") or not isinstance(container, dict):
                return name or "a container"
            keys = [*before, *(key for key in container if key not in before)]
            return str(next(key for key in keys if container.get(key) is not before.get(key)))
    return None
