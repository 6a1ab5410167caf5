"""Recordings of one model at several sizes become one list of calls in which every number is right for any batch.

A number that is equal at all sizes is a constant. One that moved is computed in the graph: from the sizes that Python
computed it from, or, where Python lost the trace (``int(n)``, numpy), as ``a * batch + b`` if that fits all recordings.
A call that fits neither, or that is not there in all recordings, cannot be kept: the module that made it is named.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .calls import Call, Recording, map_values
from .numbers import Expr, Guard, Known, Ref, plain


class Misfit(Exception):
    """A module, ``path``, whose calls are not the same at all sizes; ``at_line``: ``source`` is the very line."""

    def __init__(self, path: str, reason: str, source: str | None = None, at_line: bool = False) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.source, self.at_line = path, reason, source, at_line


@dataclass(frozen=True)
class OpenGuard:
    """A comparison that other sizes could decide otherwise: the batch size if ``of_batch``, else another one."""

    guard: Guard
    of_batch: bool


@dataclass
class Resolved:
    """Calls with :class:`Ref`, :class:`Expr` and constants as arguments; the result; what they use; free numbers."""

    calls: list[Call]
    leaves: list[Any]
    structure: Any
    objects: dict[str, Any]
    guards: list[OpenGuard]
    entered: set[str]
    groups: dict[int, dict[str, Any]]


def resolve(recordings: Sequence[Recording]) -> Resolved:
    """Make one list of calls of recordings at several sizes.

    Raises:
        Misfit: a module does something else at another size.
    """
    first = recordings[0]
    _same_calls(recordings)
    _same_objects(recordings)
    _same_lengths(recordings)
    calls = []
    for index, call in enumerate(first.calls):
        others = [recording.calls[index] for recording in recordings]
        args = _fit([other.args for other in others], index, recordings)
        kwargs = _fit([other.kwargs for other in others], index, recordings)
        calls.append(replace(call, args=args, kwargs=kwargs))
    structures = [recording.result[1] for recording in recordings]
    if any(structure != structures[0] for structure in structures):
        raise Misfit("", "its result has another structure for another size")
    leaves = [_fit(list(parts), len(calls), recordings) for parts in zip(*(r.result[0] for r in recordings))]
    return Resolved(calls, leaves, structures[0], first.objects, _open(recordings), first.entered, first.groups)


def _same_calls(recordings: Sequence[Recording]) -> None:
    for index, call in enumerate(recordings[0].calls):
        for recording in recordings[1:]:
            if index >= len(recording.calls):
                raise Misfit(call.path, "it makes other calls for another size", call.source)
            other = recording.calls[index]
            ours, theirs = (call.op, call.target, call.path), (other.op, other.target, other.path)
            if ours != theirs or call.region != other.region or call.group != other.group:
                raise Misfit(common_path(call.path, other.path), "it makes other calls for another size", call.source)
    for recording in recordings[1:]:
        if len(recording.calls) > len(recordings[0].calls):
            extra = recording.calls[len(recordings[0].calls)]
            raise Misfit(extra.path, "it makes other calls for another size", extra.source)


def common_path(*paths: str) -> str:
    """Return the innermost module that all paths are inside of."""
    parts = [path.split(".") if path else [] for path in paths]
    common = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts))
    return ".".join(names[0] for names in common)


def _same_objects(recordings: Sequence[Recording]) -> None:
    for name, value in recordings[0].objects.items():
        for recording in recordings[1:]:
            other = recording.objects.get(name)
            if other is not value and not (not isinstance(value, torch.Tensor) and _equal(value, other)):
                user = next((c for c in recordings[0].calls if c.op == "get_attr" and c.target == name), None)
                if user is None:  # what used it was rolled back
                    continue
                raise Misfit(user.path, f"it uses another {type(value).__name__} at every call", user.source)


def _same_lengths(recordings: Sequence[Recording]) -> None:
    """Refuse ``len`` of what moves: Python makes a plain number of it, and could compare that with anything."""
    for first, *others in zip(*(recording.lengths for recording in recordings)):
        if any(other[0] != first[0] for other in others):
            raise Misfit(first[1], "it takes len() of a batch; x.shape[0] can be followed", first[2], at_line=True)


def _fit(values: list[Any], index: int, recordings: Sequence[Recording]) -> Any:
    """Unite the same argument of all recordings."""
    flat: list[list[Any]] = []
    for value in values:
        leaves: list[Any] = []
        map_values(leaves.append, value)
        flat.append(leaves)
    if any(len(leaves) != len(flat[0]) for leaves in flat) or len({_shape(value) for value in values}) > 1:
        raise _misfit(index, recordings, "it passes other arguments for another size")
    united = iter([_fit_leaf(list(leaves), index, recordings) for leaves in zip(*flat)])
    return map_values(lambda _: next(united), values[0])


def _shape(value: Any) -> str:
    return repr(map_values(lambda _: None, value))


def _misfit(index: int, recordings: Sequence[Recording], reason: str) -> Misfit:
    calls = recordings[0].calls
    call = calls[index] if index < len(calls) else None
    return Misfit(call.path, reason, call.source, at_line=True) if call else Misfit("", reason)


def _fit_leaf(leaves: list[Any], index: int, recordings: Sequence[Recording]) -> Any:
    first = leaves[0]
    if isinstance(first, Ref):
        if any(leaf != first for leaf in leaves):
            raise _misfit(index, recordings, "it uses other values for another size")
        return first
    numbers = [plain(leaf) for leaf in leaves]
    exprs = [leaf.expr if isinstance(leaf, Known) else None for leaf in leaves]
    from_data = exprs[0] is not None and exprs[0].from_data
    if not from_data and all(_equal(numbers[0], number) for number in numbers):
        return numbers[0]
    if exprs[0] is not None and all(expr == exprs[0] for expr in exprs):
        return exprs[0]
    fitted = _linear(numbers, index, recordings)
    if fitted is None:
        raise _misfit(
            index, recordings, f"it uses a constant that changes from run to run ({_list(numbers)}) for no reason that "
            "can be kept"
        )  # fmt: skip
    return fitted


def _list(values: list[Any]) -> str:
    return ", ".join(repr(value)[:20] for value in values)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    try:
        return bool(a == b)
    except Exception:
        return False


def _linear(numbers: list[Any], index: int, recordings: Sequence[Recording]) -> Any:
    """Fit ``a * batch + b`` (integers) or ``a / batch`` (floats) through all recordings."""
    if len({recording.rows for recording in recordings}) < 3 or any(
        type(number) not in (int, float) for number in numbers
    ):
        return None
    source = _batch_source(index, recordings)
    if source is None:
        return None
    expr, sizes = source
    if all(type(number) is int for number in numbers):
        slope, rest = divmod(numbers[1] - numbers[0], sizes[1] - sizes[0])
        offset = numbers[0] - slope * sizes[0]
        if rest == 0 and all(slope * size + offset == number for size, number in zip(sizes, numbers)):
            scaled = expr if slope == 1 else Expr("mul", (expr, slope))
            return scaled if offset == 0 else Expr("add", (scaled, offset))
        return None
    for name, function in (("mul", operator.mul), ("truediv", operator.truediv)):
        factor = numbers[0] / sizes[0] if name == "mul" else numbers[0] * sizes[0]
        fits = (math.isclose(number, function(factor, size), rel_tol=1e-12) for size, number in zip(sizes, numbers))
        if factor and all(fits):
            return Expr(name, (float(factor), expr))
    return None


def _batch_source(index: int, recordings: Sequence[Recording]) -> tuple[Expr, list[int]] | None:
    """Find the nearest value before the call that has the batch as a dimension."""
    calls = recordings[0].calls
    wanted = [recording.rows for recording in recordings]
    used: list[int] = []
    if index < len(calls):
        map_values(lambda leaf: used.append(leaf.index) if isinstance(leaf, Ref) else None, calls[index].args)
    for candidate in (*used, *range(min(index, len(calls)) - 1, -1, -1)):
        for path, shape in calls[candidate].shapes.items():
            for dim in range(len(shape)):
                sizes = [r.calls[candidate].shapes.get(path, ())[dim : dim + 1] for r in recordings]
                if [size[0] if size else None for size in sizes] == wanted:
                    return Expr("size", (Ref(candidate, path), dim)), wanted
    return None


def _open(recordings: Sequence[Recording]) -> list[OpenGuard]:
    """Keep the comparisons that other sizes could decide otherwise; alike ones once."""
    found: dict[Any, OpenGuard] = {}
    if len({len(recording.guards) for recording in recordings}) > 1:
        return []
    rows = [recording.rows for recording in recordings]
    for guards in zip(*(recording.guards for recording in recordings)):
        lefts, rights = [g.left[1] for g in guards], [g.right[1] for g in guards]
        if any(value != lefts[0] for value in lefts) or any(value != rights[0] for value in rights):
            of_batch = _depends_on_batch(guards[0], [a - b for a, b in zip(lefts, rights)], rows)
            if of_batch is not None:
                key = (tuple(lefts), tuple(rights), guards[0].comparison)
                found.setdefault(key, OpenGuard(guards[0], of_batch))
    return list(found.values())


def _depends_on_batch(guard: Guard, gaps: list[float], rows: list[int]) -> bool | None:
    """Say whether the batch size decides (True), another size does (False), or the outcome is always the same (None).

    ``gaps`` are left minus right at the batch sizes ``rows``, taken to be linear in the batch.
    """
    compare = getattr(operator, guard.comparison)
    if not any(gaps):
        return None
    if len(rows) < 2 or rows[1] == rows[0]:
        return False
    slope = (gaps[1] - gaps[0]) / (rows[1] - rows[0])
    at = [gaps[0] + slope * (row - rows[0]) for row in rows]
    if any(not math.isclose(a, b, abs_tol=1e-9) for a, b in zip(at, gaps)):
        return False
    far = [gaps[0] + slope * (row - rows[0]) for row in (1, 10**9)]
    if any(compare(gap, 0) != guard.outcome for gap in far):
        return True
    crossing = rows[0] - gaps[0] / slope if slope else 0.5
    equality = guard.comparison in ("eq", "ne")
    return True if equality and crossing >= 1 and crossing == int(crossing) else None
