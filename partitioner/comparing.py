"""Play a training call on a module, keep what it gave and left behind, and compare two such records."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..structure import Structure, flatten, tensors_in

_RTOL = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_USUAL_RTOL = 1e-4
# Below this share of the largest tensor of its kind a difference counts as rounding.
_FLOOR = 1e-3


@dataclass(frozen=True)
class Difference:
    """What differs, in which call."""

    call: str
    what: str
    how: str

    def __str__(self) -> str:
        return f"{self.call}: {' '.join(filter(None, (self.what, self.how)))}"


@dataclass
class Record:
    """What one call gave and left behind: values by name, for each kind of them."""

    structure: Structure
    result: dict[str, Any]
    gradient: dict[str, Any]
    state: dict[str, Any]


def play(module: nn.Module, model: nn.Module, arguments: tuple[Any, Any], seed: int) -> Record:
    """Call ``module`` from a seed, go backward, and keep the gradients and the state of ``model``."""
    args, kwargs = arguments
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    leaves, structure = flatten(module(*args, **kwargs))
    result = {f"result {place}" if len(leaves) > 1 else "the result": _kept(leaf) for place, leaf in enumerate(leaves)}
    loss = _loss(leaves)
    if loss is not None:
        loss.backward()  # type: ignore[no-untyped-call]
    gradient = {f"the gradient of parameter {name!r}": _kept(p.grad) for name, p in model.named_parameters()}
    given = enumerate(tensors_in((args, kwargs)))
    gradient |= {f"the gradient of argument {n}": _kept(tensor.grad) for n, tensor in given if tensor.is_leaf}
    state = {f"parameter {name!r} after the call": _kept(tensor) for name, tensor in model.named_parameters()}
    state |= {f"buffer {name!r} after the call": _kept(tensor) for name, tensor in model.named_buffers()}
    return Record(structure, result, gradient, state)


def _kept(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _loss(leaves: Sequence[Any]) -> torch.Tensor | None:
    """Weigh all numbers that have a gradient by fixed random ones, and add up."""
    generator = torch.Generator().manual_seed(1)
    terms = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            real = _dense(leaf)
            real = torch.view_as_real(real) if real.is_complex() else real
            real = real.float() if real.dtype in (torch.float16, torch.bfloat16) else real
            weights = torch.rand(real.shape, generator=generator, dtype=real.dtype)
            terms.append((real * weights.to(real.device)).sum().to("cpu", torch.float64))
    return torch.stack(terms).sum() if terms else None


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_nested:
        return tensor.to_padded_tensor(0.0)
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def compare(call: str, wanted: Sequence[Record], given: Sequence[Record]) -> tuple[float, list[Difference]]:
    """Return the worst relative error, and the differences that are more than rounding."""
    found: list[tuple[float, Difference | None]] = []
    for number, (ours, theirs) in enumerate(zip(wanted, given)):
        name = call if number == 0 else f"{call}, call {number + 1}"
        if ours.structure != theirs.structure:
            found.append((float("inf"), Difference(name, "the result", "has another structure")))
            continue
        for kind in ("result", "gradient", "state"):
            found += _compare(name, getattr(ours, kind), getattr(theirs, kind))
    return max((error for error, _ in found), default=0.0), [item for _, item in found if item is not None]


def _compare(
    call: str, wanted: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[tuple[float, Difference | None]]:
    floor: float | None = None  # known where it is needed
    for what in [*wanted, *(name for name in given if name not in wanted)]:
        if what not in wanted or what not in given:
            yield float("inf"), Difference(call, what, "is only in one of the two")
            continue
        ours, theirs = wanted[what], given[what]
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
            form = _other_form(ours, theirs)
            if form is not None:
                yield float("inf"), Difference(call, what, form)
            elif not torch.equal(_dense(ours), _dense(theirs)):
                floor = _FLOOR * max(map(_largest, wanted.values())) if floor is None else floor
                yield _numbers(call, what, ours, theirs, floor)
        elif not _same(ours, theirs):
            yield float("inf"), Difference(call, what, f"is {_name(theirs)} instead of {_name(ours)}")


def _other_form(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    for quality in ("shape", "dtype", "device", "layout", "requires_grad"):
        a, b = getattr(ours, quality), getattr(theirs, quality)
        if a != b:
            return f"has {quality.replace('_', ' ')} {_plain(b)} instead of {_plain(a)}"
    return None


def _numbers(
    call: str, what: str, ours: torch.Tensor, theirs: torch.Tensor, floor: float
) -> tuple[float, Difference | None]:
    error = relative_error(_dense(ours.detach()), _dense(theirs.detach()), floor)
    allowed = _RTOL.get(ours.dtype, _USUAL_RTOL)
    how = f"differs: relative error {error:.3g}, allowed {allowed:.1g}"
    return error, None if error <= allowed else Difference(call, what, how)


def relative_error(expected: torch.Tensor, given: torch.Tensor, floor: float = 0.0) -> float:
    """Return the largest difference over the largest value (at least ``floor``); what is not finite must be equal."""
    if torch.equal(expected, given) or not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to("cpu", wide), given.to("cpu", wide)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    infinite = a.isinf()
    if not torch.equal(a[infinite], b[infinite]):
        return float("inf")
    difference = float((a[finite] - b[finite]).abs().max()) if finite.any() else 0.0
    scale = max(_largest(expected), floor)
    return difference / scale if scale else (0.0 if difference == 0.0 else float("inf"))


def _largest(value: Any) -> float:
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return 0.0
    sizes = _dense(value.detach()).abs()
    sizes = sizes[sizes.isfinite()]
    return float(sizes.max()) if sizes.numel() else 0.0


def _same(ours: Any, theirs: Any) -> bool:
    """Compare values that are no tensors; objects without equality of their own are told apart by type only."""
    if ours is theirs:
        return True
    if type(ours) is not type(theirs):
        return False
    if all("__eq__" not in vars(kind) for kind in type(ours).__mro__[:-1]):
        return True
    if isinstance(ours, float) and ours != ours:
        return bool(theirs != theirs)
    try:
        return bool(np.all(ours == theirs))
    except Exception:
        return False


def _name(value: Any) -> str:
    return "a tensor" if isinstance(value, torch.Tensor) else repr(value)[:40]


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")
