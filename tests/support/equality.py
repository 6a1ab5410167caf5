"""Does a captured model do what the model does, call after call, and did capturing leave the model alone?

``compare`` plays the same calls on a model and on a capture of its twin, and lists what differs: results, gradients,
parameters, buffers and random states. ``Snapshot`` tells what capturing changed.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from walking import leaves_of

TOLERANCE = 1e-5  # of the largest number of a tensor; a tensor in half precision is given more
_HALF = (torch.float16, torch.bfloat16)
_LEARNING_RATE = 0.05


@dataclass(frozen=True)
class Call:
    """One training or evaluation call with its arguments; every random state is seeded with ``seed`` before it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    training: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Eager:
    """A model in the place of a capture: what the comparison says of it shows whether it can be believed."""

    model: nn.Module

    @property
    def module(self) -> nn.Module:
        """Return the model."""
        return self.model


@dataclass
class _Record:
    """What one call gave, left behind and drew."""

    result: dict[str, Any] = field(default_factory=dict)
    gradient: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def seed_everything(seed: int) -> None:
    """Seed torch, Python's random and numpy."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed is a hundred times slower, for devices not here
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)


@contextmanager
def own_random_state() -> Iterator[None]:
    """Give torch, Python's random and numpy their state back."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def make_call(
    name: str,
    args: Callable[[int], tuple[Any, ...]],
    kwargs: Callable[[int], dict[str, Any]],
    rows: int,
    seed: int,
    training: bool = True,
) -> Call:
    """Draw the arguments of a call of ``rows`` rows; the same seed gives the same call."""
    with own_random_state():
        seed_everything(seed)
        return Call(name, args(rows), kwargs(rows), training, seed + 1)


def usual_calls(
    args: Callable[[int], tuple[Any, ...]],
    kwargs: Callable[[int], dict[str, Any]],
    rows: int,
    *,
    other_rows: Sequence[int] = (),
    modes: bool = True,
) -> list[Call]:
    """List calls that a capture must get right: other data, other rows, evaluation, and training again.

    The first call has the arguments that ``make_call("example", args, kwargs, rows, 0)`` has.
    """
    plan = [("example", rows, True), ("second", rows, True), ("third", rows, True)]
    plan += [(f"with {count} rows", count, True) for count in other_rows]
    plan += [("evaluation", rows, False), ("second evaluation", rows, False)] * modes
    plan += [(f"evaluation with {count} rows", count, False) for count in other_rows] * modes
    plan += [("last", rows, True)]
    return [make_call(name, args, kwargs, count, 10 * i, training) for i, (name, count, training) in enumerate(plan)]


def compare(
    model: nn.Module,
    capture: Any,
    calls: Sequence[Call],
    *,
    tolerance: float = TOLERANCE,
    values: bool = True,
    reset: Callable[[], None] | None = None,
) -> list[str]:
    """List the differences between ``model`` and ``capture`` (of an equal model, not of ``model`` itself).

    All calls are played on one and then on the other, each with a step of gradient descent after it, so that state that
    one call leaves to the next takes part. ``capture`` has ``model``, whose parameters and buffers are looked at, and
    ``module``, which is called. ``reset`` brings state outside of the models back before each. Without ``values`` only
    names, types, shapes and dtypes are compared. An empty list means that the two are the same.
    """
    with own_random_state():
        wanted = _play(model, model, calls, reset)
        given = _play(capture.model, capture.module, calls, reset)
    found: list[str] = []
    for call, ours, theirs in zip(calls, wanted, given):
        if ours.error or theirs.error:
            found += [f"{call.name}: the model itself raises {ours.error}"] if ours.error else []
            found += [f"{call.name}: the capture raises {theirs.error}"] if theirs.error else []
            break
        for kind in ("result", "gradient", "state") + (("random",) if values else ()):
            differences = different(getattr(ours, kind), getattr(theirs, kind), tolerance, values)
            found += [f"{call.name}: {kind} {difference}" for difference in differences]
    return found


def set_mode(model: nn.Module, module: nn.Module, training: bool) -> None:
    """Bring a model, and the captured graph that computes in its place, into a mode."""
    module.train(training)
    model.train(training)  # last, and by the model's own method, which may keep some layers out


def _play(
    model: nn.Module, module: nn.Module, calls: Sequence[Call], reset: Callable[[], None] | None
) -> list[_Record]:
    if reset is not None:
        reset()
    records: list[_Record] = []
    for call in calls:
        record = _Record()
        records.append(record)
        try:
            set_mode(model, module, call.training)
            _one_call(model, module, call, record)
        except Exception as error:
            lines = str(error).strip().splitlines()
            record.error = f"{type(error).__name__}: {lines[0] if lines else ''}"
            break
    return records


def _one_call(model: nn.Module, module: nn.Module, call: Call, record: _Record) -> None:
    args, kwargs = copy.deepcopy((call.args, call.kwargs))
    model.zero_grad()
    seed_everything(call.seed)
    result = module(*args, **kwargs)
    leaves = dict(leaves_of(result))
    record.result = {path: _kept(leaf) for path, leaf in leaves.items()}
    loss = _loss(leaves.values())
    if loss is not None:
        loss.backward()
    record.random = {
        "of torch": torch.get_rng_state(),
        "of Python": random.getstate(),
        "of numpy": _state_of_numpy(),
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    record.gradient = {f"of {name}": _kept(parameter.grad) for name, parameter in parameters.items()}
    for path, leaf in leaves_of((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.is_leaf:
            record.gradient[f"of input {path}"] = _kept(leaf.grad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(_LEARNING_RATE * parameter.grad)
    everything = parameters | dict(model.named_buffers(remove_duplicate=False))
    record.state = {name: _kept(tensor) for name, tensor in everything.items()}


def _state_of_numpy() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=True)
    return state[1].tobytes(), *state[2:]


def _kept(leaf: Any) -> Any:
    """Copy a leaf, which may be written into later."""
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if leaf.is_floating_point() else leaf.clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _loss(leaves: Iterable[Any]) -> torch.Tensor | None:
    """Weigh all numbers that have a gradient by fixed random ones, and add up."""
    generator = torch.Generator().manual_seed(1)
    terms = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            real = (torch.view_as_real(leaf) if leaf.is_complex() else leaf).double()
            terms.append((real * torch.rand(real.shape, generator=generator, dtype=real.dtype).to(real.device)).sum())
    return torch.stack(terms).sum() if terms else None


def different(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float, values: bool = True) -> list[str]:
    """Say for each name how the second dictionary of leaves differs from the first."""
    if list(ours) != list(theirs):
        lost = [name or "itself" for name in ours if name not in theirs]
        new = [name or "itself" for name in theirs if name not in ours]
        return [f"has other parts: without {lost}, but with {new}"]
    return [
        f"{name} {how}".strip() for name in ours if (how := _difference(ours[name], theirs[name], tolerance, values))
    ]


def _difference(a: Any, b: Any, tolerance: float, values: bool) -> str:
    if type(a) is not type(b):
        return f"is {type(b).__name__} instead of {type(a).__name__}"
    if isinstance(a, np.ndarray):
        a, b = torch.from_numpy(a), torch.from_numpy(b)
    if isinstance(a, torch.Tensor):
        for what in ("shape", "dtype", "device", "requires_grad", "layout"):
            if getattr(a, what) != getattr(b, what):
                return f"has {what} {getattr(b, what)} instead of {getattr(a, what)}"
        return _numbers_differ(a.detach(), b.detach(), tolerance) if values else ""
    if not values:
        return ""
    if isinstance(a, float):
        return _numbers_differ(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), tolerance)
    return "" if a is b or bool(a == b) else f"is {_short(b)} instead of {_short(a)}"


def _numbers_differ(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> str:
    if torch.equal(a, b) or a.numel() == 0:
        return ""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.is_floating_point():
        return "differs"
    allowed = max(tolerance, 1e-2 if a.dtype in _HALF else 0.0)
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(9.0), b[~finite].nan_to_num(9.0)):
        return "is not finite in other places"
    if not finite.any():
        return ""
    largest = float(a[finite].abs().max())
    error = float((a[finite] - b[finite]).abs().max())
    return "" if error <= allowed * max(largest, 1e-3) else f"differs by {error:.2g} of {largest:.2g}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
