"""What is not a torch function but must be seen: calls of modules, custom autograd functions, checkpoints, regions."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from ...runtime.program.calls import Scripted
from .state import TraceRefused
from .surroundings import line

call_module = nn.Module.__call__
Replacement = tuple[Any, str, Any]  # where, by what name, with what
apply_function = torch.autograd.Function.__dict__["apply"]


class Watcher(Protocol):
    """What is told of the calls."""

    @property
    def paused(self) -> bool:
        """Say whether calls are to be left alone."""

    def call_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module."""

    def called_inside(self, module: nn.Module) -> None:
        """A module is called while calls are left alone."""

    def converted(self, module: nn.Module) -> None:
        """The parameters of a module are about to be converted or moved."""

    def attribute_set(self, module: nn.Module) -> None:
        """An attribute of a module is about to be set."""

    def apply(self, cls: Any, args: Any, kwargs: Any) -> Any:
        """Apply a custom autograd function."""

    def call(self, target: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call ``function``, written down as ``target``."""

    def check(self, condition: torch.Tensor) -> None:
        """The model demands that ``condition`` holds everywhere."""

    def checkpointed(self, options: dict[str, Any]) -> AbstractContextManager[None]:
        """Surround what a checkpoint runs."""

    def autocast_entered(self, context: Any) -> None:
        """An autocast region begins."""

    def autocast_left(self) -> None:
        """An autocast region ends."""


@contextmanager
def replaced(recorder: Watcher) -> Iterator[None]:
    """Send calls of modules, custom autograd functions, checkpoints and autocast regions through ``recorder``."""
    replacements = [*_of_calls(recorder), *_of_regions(recorder), *_of_modules(recorder), *_of_draws(recorder)]
    before = [(place, name, vars(place).get(name, getattr(place, name))) for place, name, _ in replacements]
    try:
        for place, name, value in replacements:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _of_calls(recorder: Watcher) -> Iterator[Replacement]:
    """Replace what is called: modules, custom autograd functions, scripted functions, checks of data."""
    script: Any = torch.jit.ScriptFunction
    call_script: Any = script.__call__
    check_all: Any = torch._check_tensor_all_with

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if recorder.paused:
            recorder.called_inside(module)
        return call_module(module, *args, **kwargs) if recorder.paused else recorder.call_module(module, args, kwargs)

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return apply_function.__func__(cls, *args, **kwargs) if recorder.paused else recorder.apply(cls, args, kwargs)

    def scripted(function: Any, *args: Any, **kwargs: Any) -> Any:
        original = functools.partial(call_script, function)
        return (
            original(*args, **kwargs) if recorder.paused else recorder.call(Scripted(function), original, args, kwargs)
        )

    def check(error: Any, condition: Any, message: Any) -> None:
        if recorder.paused or not isinstance(condition, torch.Tensor):
            check_all(error, condition, message)
        else:
            recorder.check(condition)

    yield nn.Module, "__call__", call
    yield torch.autograd.Function, "apply", classmethod(apply)
    yield script, "__call__", scripted
    yield torch, "_check_tensor_all_with", check


def _of_regions(recorder: Watcher) -> Iterator[Replacement]:
    """Replace what surrounds calls: checkpoints and autocast."""
    autocast: Any = torch.amp.autocast_mode.autocast
    enter, leave = autocast.__enter__, autocast.__exit__
    generator: Any = torch_checkpoint._checkpoint_without_reentrant_generator

    def without_reentry(fn: Any, preserve: bool = True, context_fn: Any = None, *args: Any, **kwargs: Any) -> Any:
        if recorder.paused:
            yield from generator(fn, preserve, context_fn, *args, **kwargs)
            return
        with recorder.checkpointed({"preserve_rng_state": preserve}):
            yield

    def entered(self: Any) -> Any:
        if not recorder.paused:
            recorder.autocast_entered(self)
        return enter(self)

    def left(self: Any, *error: Any) -> Any:
        if not recorder.paused:
            recorder.autocast_left()
        return leave(self, *error)

    yield torch_checkpoint, "_checkpoint_without_reentrant_generator", without_reentry
    yield autocast, "__enter__", entered
    yield autocast, "__exit__", left


def _of_modules(recorder: Watcher) -> Iterator[Replacement]:
    """Replace what changes modules: setting attributes, converting parameters."""
    convert_plainly: Any = nn.Module._apply
    set_plainly = nn.Module.__setattr__

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if not recorder.paused:
            recorder.attribute_set(module)
        set_plainly(module, name, value)

    def convert(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not recorder.paused:
            recorder.converted(module)
        return convert_plainly(module, *args, **kwargs)

    yield nn.Module, "__setattr__", set_attribute
    yield nn.Module, "_apply", convert


def _of_draws(recorder: Watcher) -> Iterator[Replacement]:
    """Replace the functions of ``random`` and ``numpy.random`` that draw, by ones that refuse."""
    own = {"getstate", "setstate", "get_state", "set_state"}
    for place, made, reason in (
        (random, vars(random)["_inst"], "it draws random numbers from Python's random module"),
        (np.random, vars(np.random.mtrand)["_rand"], "it draws random numbers from numpy"),
    ):
        for name, value in vars(place).items():
            if getattr(value, "__self__", None) is made and name not in own:
                yield place, name, _refusing(recorder, value, reason)


def _refusing(recorder: Watcher, draw: Callable[..., Any], reason: str) -> Callable[..., Any]:
    @functools.wraps(draw)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if recorder.paused:
            return draw(*args, **kwargs)
        raise TraceRefused(reason, line())

    return refuse
