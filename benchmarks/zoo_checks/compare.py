"""Compare two runs of a model: results, parameter gradients and buffers. Independent of the package that is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Worst error, relative to the largest value of a tensor. Tensors that are far smaller than the largest of their kind
# (gradients that are zero but for rounding) are held against a thousandth of that one.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_FLOOR = 1e-3


@dataclass
class Run:
    """What one run of a model left behind: its result, its gradients and buffers by name, or its error."""

    output: Any = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    error: str = ""


@dataclass
class Verdict:
    """How two runs compare.

    Attributes:
        ok: equal within the tolerance.
        bitwise: equal to the last bit.
        error: the worst relative error; infinite for what cannot be compared.
        detail: the first difference, in words.
        decisive: the reference has finite values and, in training, gradients that are not all zero.
    """

    ok: bool = True
    bitwise: bool = True
    error: float = 0.0
    detail: str = ""
    decisive: bool = True


def open_value(value: Any, path: str = "output") -> Iterable[tuple[str, Any]]:
    """List the leaves of a nested value with their paths; containers are listed too, by their type."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        yield path, type(value)
        for key in value:
            yield from open_value(value[key], f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        yield path, type(value)
        for index, item in enumerate(value):
            yield from open_value(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield path, type(value)
        for item in dataclasses.fields(value):
            yield from open_value(getattr(value, item.name, None), f"{path}.{item.name}")
    elif type(value).__module__.partition(".")[0] not in ("builtins", "torch") and _attributes(value):
        yield path, type(value)
        for key, item in _attributes(value).items():
            yield from open_value(item, f"{path}.{key}")
    else:
        yield path, value


def _attributes(value: Any) -> dict[str, Any]:
    names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    held = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return held | getattr(value, "__dict__", {})


def tensors_of(value: Any) -> list[Tensor]:
    """List the tensors in a nested value."""
    return [leaf for _, leaf in open_value(value) if isinstance(leaf, Tensor)]


def objective(output: Any) -> Tensor | None:
    """Weigh every differentiable number of a result with its own constant, so that no gradient hides another."""
    total = None
    generator = torch.Generator().manual_seed(99)
    for leaf in tensors_of(output):
        if not leaf.requires_grad:
            continue
        real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        weights = 0.5 + torch.rand(real.shape, generator=generator)
        part = (real * weights.to(real.dtype)).sum()
        total = part if total is None else total + part
    return total


def compare(reference: Run, given: Run, tolerance: float, *, gradients: bool) -> Verdict:
    """Hold ``given`` against ``reference``."""
    if given.error:
        return Verdict(False, False, float("inf"), given.error)
    verdict = Verdict()
    _compare_leaves(verdict, reference.output, given.output, tolerance)
    if gradients:
        _compare_named(verdict, "gradient of", reference.gradients, given.gradients, tolerance)
        known = [gradient for gradient in reference.gradients.values() if gradient is not None]
        verdict.decisive &= any(bool(gradient.any()) for gradient in known)
    _compare_named(verdict, "buffer", reference.buffers, given.buffers, tolerance)
    verdict.decisive &= all(bool(leaf.isfinite().all()) for leaf in tensors_of(reference.output))
    return verdict


def _fail(verdict: Verdict, detail: str, error: float = float("inf")) -> None:
    verdict.ok = verdict.bitwise = False
    verdict.error = max(verdict.error, error)
    verdict.detail = verdict.detail or detail


def _compare_leaves(verdict: Verdict, reference: Any, given: Any, tolerance: float) -> None:
    ours, theirs = list(open_value(reference)), list(open_value(given))
    if [path for path, _ in ours] != [path for path, _ in theirs]:
        _fail(verdict, f"the result is built differently: {_first_odd(ours, theirs)}")
        return
    scale = _scale(leaf for _, leaf in ours if isinstance(leaf, Tensor))
    for (path, mine), (_, other) in zip(ours, theirs):
        if isinstance(mine, Tensor) and isinstance(other, Tensor):
            _compare_tensors(verdict, path, mine, other, tolerance, scale)
        elif isinstance(mine, Tensor) or isinstance(other, Tensor) or not _same(mine, other):
            _fail(verdict, f"{path} is {_word(other)}, expected {_word(mine)}")


def _compare_named(
    verdict: Verdict,
    kind: str,
    reference: Mapping[str, Tensor | None],
    given: Mapping[str, Tensor | None],
    tolerance: float,
) -> None:
    scale = _scale(tensor for tensor in reference.values() if tensor is not None)
    for name, mine in reference.items():
        other = given.get(name)
        if mine is None and other is None:
            continue
        if mine is None or other is None:
            _fail(verdict, f"{kind} {name} is {_word(other)}, expected {_word(mine)}")
        else:
            _compare_tensors(verdict, f"{kind} {name}", mine, other, tolerance, scale)


def _compare_tensors(verdict: Verdict, what: str, mine: Tensor, other: Tensor, tolerance: float, scale: float) -> None:
    if mine.shape != other.shape or mine.dtype != other.dtype:
        _fail(verdict, f"{what} is {_word(other)}, expected {_word(mine)}")
        return
    mine, other = mine.detach(), other.detach()
    if mine.layout is not torch.strided:
        mine, other = mine.to_dense(), other.to_dense()
    if torch.equal(mine, other):
        return
    if not mine.is_floating_point() and not mine.is_complex():
        _fail(verdict, f"{what} differs")
        return
    if not torch.equal(mine.isfinite(), other.isfinite()):
        _fail(verdict, f"{what} is finite in other places")
        return
    difference = float(torch.where(mine.isfinite(), mine - other, 0).abs().max())
    if difference == 0:  # only NaN beside NaN, or infinities of whatever sign
        return
    size = max(_scale([mine]), _FLOOR * scale)
    verdict.bitwise = False
    error = difference / size if size else float("inf")
    verdict.error = max(verdict.error, error)
    if error > tolerance:
        _fail(verdict, f"{what} is off by {error:.1e}", error)


def _scale(tensors: Iterable[Tensor]) -> float:
    largest = 0.0
    for tensor in tensors:
        dense = tensor.detach()
        if dense.numel() and (dense.is_floating_point() or dense.is_complex()) and dense.layout is torch.strided:
            largest = max(largest, float(torch.where(dense.isfinite(), dense, 0).abs().max()))
    return largest


def _same(mine: Any, other: Any) -> bool:
    try:
        return type(mine) is type(other) and bool(mine == other or mine != mine)
    except Exception:  # an object of the model's own that does not compare is not a result to be judged
        return True


def _word(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)[:80]


def _first_odd(ours: list[tuple[str, Any]], theirs: list[tuple[str, Any]]) -> str:
    for (mine, _), (other, _) in zip(ours, theirs):
        if mine != other:
            return f"{other}, expected {mine}"
    return f"{len(theirs)} leaves, expected {len(ours)}"
