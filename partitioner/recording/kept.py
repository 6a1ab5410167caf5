"""Functions of the model's code that are kept whole: the smallest unit that can be, smaller than a module.

Where a forward calls a helper that no graph can hold (it draws from numpy, reads numbers out of tensors), the helper
becomes one call in the graph, as with ``torch.fx.wrap``, but found by itself and for methods too. Calls are caught by
giving the function other code for as long as a recording lasts, so that it does not matter how it is looked up.
"""

from __future__ import annotations

import gc
import inspect
import os
import threading
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ...runtime.program.calls import Attributes, KeptFunction, KeptMethod, OutOfReach, form_of
from ...structure import flatten
from .calls import parts_of, without_memory
from .madeup import forms
from .state import TraceRefused, changed_attribute, contents_of_object, restore
from .surroundings import is_of_the_model

Caught = Callable[[types.CodeType, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_COPY = "copied_by_stagecut"
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
_MOST_FUNCTIONS = 500
_NOT_PLAIN = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class KeptFunctions:
    """Which functions are kept whole and why, and which cannot be.

    ``functions`` maps the code of a function to it and to the refusal that led to it. ``needs_data`` says that one was
    rejected only because it does not run on made-up numbers. What is done at ``lines`` cannot be kept, for the reasons
    given; of branches at the lines in ``unforked`` not both sides can.
    """

    def __init__(self) -> None:
        self.functions: dict[types.CodeType, tuple[types.FunctionType, TraceRefused]] = {}
        self.rejected: set[types.CodeType] = set()
        self.needs_data = False
        self.unforked: set[str | None] = set()
        self.lines: dict[str | None, str] = {}

    def copy(self) -> KeptFunctions:
        """Return another that knows the same."""
        other = KeptFunctions()
        other.functions, other.rejected = dict(self.functions), set(self.rejected)
        other.needs_data, other.lines, other.unforked = self.needs_data, dict(self.lines), set(self.unforked)
        return other

    def find(self, refusal: TraceRefused, module: nn.Module) -> types.CodeType | None:
        """Choose the innermost function between the module's forward and the line that could not be followed."""
        for frame in reversed(list(_frames_between(refusal, module))):
            code = frame.f_code
            if code in self.functions:  # its calls are caught, so this was another function: one made at every call
                self.reject(code)
            if code in self.rejected or code.co_flags & _NOT_PLAIN or code.co_name.startswith("<"):
                continue
            function = _function_of(frame)
            if function is not None:
                self.functions[code] = (function, TraceRefused(refusal.reason, refusal.source))
                return code
            self.rejected.add(code)
        return None

    def reject(self, code: types.CodeType) -> TraceRefused:
        """Give a function up that cannot be kept either; returns why it was to be kept."""
        self.rejected.add(code)
        return self.functions.pop(code)[1]


def _function_of(frame: types.FrameType) -> types.FunctionType | None:
    """Find the function that runs in a frame, if that is clear: several can have the same code."""
    functions = [item for item in gc.get_referrers(frame.f_code) if type(item) is types.FunctionType]
    functions = [function for function in functions if _COPY not in vars(function)]
    if len(functions) > 1 and frame.f_code.co_argcount:
        own = type(frame.f_locals.get(frame.f_code.co_varnames[0]))
        methods = {id(found) for cls in own.__mro__ for value in vars(cls).values() for found in _wrapped(value)}
        functions = [function for function in functions if id(function) in methods]
    return functions[0] if len(functions) == 1 else None


def _wrapped(value: Any) -> Iterator[Any]:
    """List a function and those that it was made from, by decorators."""
    value = getattr(value, "__func__", value)
    while isinstance(value, types.FunctionType):
        yield value
        value = getattr(value, "__wrapped__", None)


def _frames_between(refusal: TraceRefused, module: nn.Module) -> Iterator[types.FrameType]:
    """List the frames of the model's own code that was running, from below the module's forward inwards."""
    frames = []
    trace = refusal.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    forward = inspect.unwrap(type(module).forward)
    own = getattr(forward, "__code__", None)
    inside = False
    for frame in frames:
        code = frame.f_code
        if inside and is_of_the_model(code.co_filename) and not _is_standard(code.co_filename):
            yield frame
        inside = inside or code is own


def _is_standard(file: str) -> bool:
    return file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file


class Catching:
    """Sends calls of kept functions to ``caught`` with their code, in the thread that made this, until it is closed."""

    def __init__(self, kept: KeptFunctions, caught: Caught) -> None:
        self.kept = kept
        self._caught = caught
        self._thread = threading.get_ident()
        self._changed: dict[types.CodeType, types.FunctionType] = {}

    def __enter__(self) -> Catching:
        for code in self.kept.functions:
            self.catch(code)
        return self

    def __exit__(self, *error: Any) -> None:
        for code in list(self._changed):
            self.release(code)

    def catch(self, code: types.CodeType) -> None:
        """Catch the calls of one more function."""
        function = self._changed[code] = self.kept.functions[code][0]
        original = _copy(function)

        def caught(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            return self._caught(code, original, args, kwargs)

        function.__code__ = _calling(caught, code.co_freevars)

    def release(self, code: types.CodeType) -> None:
        """Give a function its own code back."""
        self._changed.pop(code).__code__ = code


@contextmanager
def catching(function: Any, caught: Callable[..., Any]) -> Iterator[None]:
    """Send calls of one function to ``caught(original, *args, **kwargs)``."""
    original, code = _copy(function), function.__code__
    function.__code__ = _calling(lambda *args, **kwargs: caught(original, *args, **kwargs), code.co_freevars)
    try:
        yield
    finally:
        function.__code__ = code


def _copy(function: types.FunctionType) -> types.FunctionType:
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    vars(made)[_COPY] = True
    return made


def _template(*args: Any, **kwargs: Any) -> Any:
    called: Any = "called"
    return called(*args, **kwargs)


def _calling(called: Callable[..., Any], free: tuple[str, ...]) -> types.CodeType:
    """Make code that calls ``called``, for a function with the free variables ``free``, which it leaves alone."""
    code = _template.__code__
    constants = tuple(called if constant == "called" else constant for constant in code.co_consts)
    return code.replace(co_consts=constants, co_freevars=free)


class _Reads(Attributes):
    """A module's attributes that remember which of them were read."""

    def __init__(self, known: dict[str, Any], away: frozenset[str], names: dict[str, None]) -> None:
        super().__init__(known, away)
        self.names = names

    def __getitem__(self, name: str) -> Any:
        self.names[name] = None
        return super().__getitem__(name)


class MethodReads:
    """Calls ``function`` as a method of ``owner`` without it, and notes what it reads; submodules are out of reach."""

    def __init__(self, function: types.FunctionType, owner: nn.Module) -> None:
        attributes = {**owner.__dict__, **owner._parameters, **owner._buffers}
        self.attributes = {name: value for name, value in attributes.items() if name not in _OF_EVERY_MODULE}
        self.tensors = {name: value for name, value in attributes.items() if isinstance(value, torch.Tensor)}
        self.method = KeptMethod(function, type(owner), {}, frozenset(owner._modules))
        self.names: dict[str, None] = {}

    def __call__(self, tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Call it with stand-ins for the tensors among the attributes."""
        versions = {name: tensor._version for name, tensor in tensors.items()}
        reads = _Reads({**self.attributes, **tensors}, self.method.away, self.names)
        result = self.method.on(reads, *args, **kwargs)
        if any(tensor._version != versions[name] for name, tensor in tensors.items()):
            raise OutOfReach("a method that is kept whole writes to a tensor of its module")
        return result

    def trimmed(self) -> tuple[KeptMethod, tuple[Any, ...]]:
        """Return the method with the attributes that it read, and the values that every call is to pass in."""
        given = tuple(name for name in self.names if name == "training" or name in self.tensors)
        constants = {name: self.attributes[name] for name in self.names if name not in given}
        away = self.method.away | (self.attributes.keys() - self.names.keys())
        made = KeptMethod(self.method.function, self.method.cls, constants, frozenset(away), given)
        return made, tuple(self.attributes[name] for name in given)


def reaches(function: Callable[..., Any], tensors: Collection[int]) -> bool:
    """Say whether a function, or one that it can call by name, closes over a module or one of ``tensors``, by id."""
    waiting: list[Any] = [function]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_FUNCTIONS:
        value = waiting.pop()
        if isinstance(value, nn.Module) or (isinstance(value, torch.Tensor) and id(value) in tensors):
            return True
        if not isinstance(value, types.FunctionType) or id(value) in seen:
            continue
        seen.add(id(value))
        if not is_of_the_model(value.__code__.co_filename) or _is_standard(value.__code__.co_filename):
            continue
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                waiting.append(cell.cell_contents)
        waiting += [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
        waiting += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return False


def run_kept(
    function: types.FunctionType,
    owner: nn.Module | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Callable[[Callable[..., Any], Any, Any], Any],
) -> tuple[KeptFunction, tuple[Any, ...], Any]:
    """Try a function, as a method of ``owner`` if that is the first argument; ``run`` calls without data.

    Returns what stands for it in a graph, the arguments of that, and the result.

    Raises:
        OutOfReach: it does more than compute a result whose form is the same for all data.
    """
    objects = [leaf for leaf in flatten((args, kwargs))[0] if not isinstance(leaf, torch.Tensor)]
    if any(isinstance(leaf, nn.Module) and leaf is not owner for leaf in objects):
        raise OutOfReach("it is handed a module")
    before = [entry for leaf in objects for entry in contents_of_object(leaf)]
    target = KeptFunction(function)
    if owner is None:
        result = run(target, args, kwargs)
    else:
        method = MethodReads(function, owner)
        result = run(method, (method.tensors, *args[1:]), kwargs)
        target, values = method.trimmed()
        args = (values, *args[1:])
    if changed_attribute(before) is not None:
        restore(before)
        raise OutOfReach("it changes what it is given")
    if any(not isinstance(leaf, (torch.Tensor, int, float, type(None))) for _, leaf in parts_of(result)):
        raise OutOfReach("it returns something else than tensors")
    form = form_of(result)
    if any(other != form for other in forms(target, without_memory(tuple(args)), without_memory(kwargs))):
        raise OutOfReach("it returns another form of result for other data")
    target.form = form
    return target, args, result


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
