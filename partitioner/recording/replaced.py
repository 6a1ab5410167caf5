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
convert_plainly = nn.Module._apply
set_plainly = nn.Module.__setattr__
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


def _drawing() -> Iterator[tuple[Any, str, Callable[..., Any], str]]:
    """List the functions of ``random`` and ``numpy.random`` that draw, with what is to be said of them."""
    own = {"getstate", "setstate", "get_state", "set_state"}
    for place, made, reason in (
        (random, vars(random)["_inst"], "it draws random numbers from Python's random module"),
        (np.random, vars(np.random.mtrand)["_rand"], "it draws random numbers from numpy"),
    ):
        for name, value in vars(place).items():
            if getattr(value, "__self__", None) is made and name not in own:
                yield place, name, value, reason


def _refusing(recorder: Watcher, draw: Callable[..., Any], reason: str) -> Callable[..., Any]:
    @functools.wraps(draw)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if recorder.paused:
            return draw(*args, **kwargs)
        raise TraceRefused(reason, line())

    return refuse


@contextmanager
def replaced(recorder: Watcher) -> Iterator[None]:
    """Send calls of modules, custom autograd functions, checkpoints and autocast regions through ``recorder``."""
    autocast: Any = torch.amp.autocast_mode.autocast
    generator: Any = torch_checkpoint._checkpoint_without_reentrant_generator
    library: Any = torch
    script: Any = torch.jit.ScriptFunction
    checkpoints: Any = torch_checkpoint
    check_all: Any = torch._check_tensor_all_with
    call_script: Any = script.__call__
    enter, leave = autocast.__enter__, autocast.__exit__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if recorder.paused:
            recorder.called_inside(module)
        return call_module(module, *args, **kwargs) if recorder.paused else recorder.call_module(module, args, kwargs)

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return apply_function.__func__(cls, *args, **kwargs) if recorder.paused else recorder.apply(cls, args, kwargs)

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if not recorder.paused:
            recorder.attribute_set(module)
        set_plainly(module, name, value)

    def convert(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not recorder.paused:
            recorder.converted(module)
        return convert_plainly(module, *args, **kwargs)  # type: ignore[no-untyped-call]

    def scripted(function: Any, *args: Any, **kwargs: Any) -> Any:
        original = functools.partial(call_script, function)
        return (
            original(*args, **kwargs) if recorder.paused else recorder.call(Scripted(function), original, args, kwargs)
        )

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

    script.__call__ = scripted

    def check(error: Any, condition: Any, message: Any) -> None:
        if recorder.paused or not isinstance(condition, torch.Tensor):
            check_all(error, condition, message)
        else:
            recorder.check(condition)

    drawing = list(_drawing())
    for place, name, draw, reason in drawing:
        setattr(place, name, _refusing(recorder, draw, reason))
    library._check_tensor_all_with = check
    nn.Module.__call__ = call  # type: ignore[method-assign]
    nn.Module._apply = convert  # type: ignore[method-assign,assignment]
    nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign,assignment]
    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    checkpoints._checkpoint_without_reentrant_generator = without_reentry
    autocast.__enter__, autocast.__exit__ = entered, left
    try:
        yield
    finally:
        for place, name, draw, _ in drawing:
            setattr(place, name, draw)
        script.__call__ = call_script
        library._check_tensor_all_with = check_all
        nn.Module.__call__ = call_module  # type: ignore[method-assign]
        nn.Module._apply = convert_plainly  # type: ignore[method-assign]
        nn.Module.__setattr__ = set_plainly  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply_function  # type: ignore[method-assign]
        checkpoints._checkpoint_without_reentrant_generator = generator
        autocast.__enter__, autocast.__exit__ = enter, leave
