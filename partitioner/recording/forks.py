"""Branches that a random number decides, as LayerDrop's do (Fan et al. 2019): calls that are made or left out.

A recording takes one side of every such fork. Others, each with one fork turned round, show which calls depend on it
and which values stand in for theirs; the calls become one that looks at the random number whenever the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...runtime.program.calls import Guarded
from .calls import Call, Recording, map_values
from .numbers import Expr, Known, Ref, plain
from .resolve import Resolved

MOST_FORKS = 128


@dataclass(frozen=True)
class Fork:
    """A tensor that Python branched on, with the outcome that was taken, after so many calls."""

    condition: Ref
    outcome: bool
    n_calls: int
    source: str | None


@dataclass(frozen=True)
class Segment:
    """The calls from ``start`` to ``end`` are made while ``condition`` is ``outcome``.

    ``instead`` maps values of those calls to the values that are used in their place where they are not made.
    """

    start: int
    end: int
    condition: Ref
    outcome: bool
    instead: dict[Ref, Ref]


class NotOptional(Exception):
    """The two sides of a fork differ in more than calls that are left out."""


def segment_of(base: Recording, turned: Recording, number: int) -> Segment | None:
    """Find the calls of ``base`` that ``turned``, where fork ``number`` went the other way, does without.

    Returns None where it is ``turned`` that makes more calls.

    Raises:
        NotOptional: they differ in another way.
    """
    fork = base.forks[number]
    missing = len(base.calls) - len(turned.calls)
    if missing < 0:
        return None
    start = fork.n_calls
    while start < len(turned.calls) and _same(base.calls[start], turned.calls[start]):
        start += 1
    if not all(_same(a, b) for a, b in zip(base.calls[: fork.n_calls], turned.calls)):
        raise NotOptional
    compare = _Comparison(start, start + missing)
    for ours, theirs in zip(base.calls[start + missing :], turned.calls[start:], strict=True):
        if _key(ours) != _key(theirs) or ours.shapes != theirs.shapes:
            raise NotOptional
        compare.values([ours.args, ours.kwargs], [theirs.args, theirs.kwargs])
    if base.result[1] != turned.result[1]:
        raise NotOptional
    compare.values(base.result[0], turned.result[0])
    if any(call.group is not None for call in base.calls[start : start + missing]):
        raise NotOptional
    return Segment(start, start + missing, fork.condition, fork.outcome, compare.instead)


def _key(call: Call) -> Any:
    return call.op, call.target, call.path, call.region, call.group


def _same(ours: Call, theirs: Call) -> bool:
    return _key(ours) == _key(theirs) and _flat([ours.args, ours.kwargs]) == _flat([theirs.args, theirs.kwargs])


def _flat(value: Any) -> tuple[str, list[Any]]:
    leaves: list[Any] = []
    shape = map_values(lambda leaf: leaves.append(plain(leaf)), value)
    return repr(shape), leaves


class _Comparison:
    """Pairs values after the calls from ``start`` to ``end`` with those of a recording without these calls."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.instead: dict[Ref, Ref] = {}

    def values(self, ours: Any, theirs: Any) -> None:
        left: list[Any] = []
        right: list[Any] = []
        shapes = map_values(left.append, ours), map_values(right.append, theirs)
        if repr(shapes[0]) != repr(shapes[1]) or len(left) != len(right):
            raise NotOptional
        for a, b in zip(left, right):
            self._pair(a, b)

    def _pair(self, a: Any, b: Any) -> None:
        if isinstance(a, Ref) and isinstance(b, Ref):
            self._refs(a, b)
        elif isinstance(a, Known) and isinstance(b, Known):
            if plain(a) != plain(b):
                raise NotOptional
            self._pair(a.expr, b.expr)
        elif isinstance(a, Expr) and isinstance(b, Expr) and a.name == b.name and len(a.args) == len(b.args):
            for x, y in zip(a.args, b.args):
                self._pair(x, y)
        elif type(a) is not type(b) or (a is not b and a != b):
            raise NotOptional

    def _refs(self, a: Ref, b: Ref) -> None:
        n_missing = self.end - self.start
        moved = Ref(b.index + n_missing, b.path) if b.index >= self.start else b
        if self.start <= a.index < self.end and b.index < self.start:
            if self.instead.setdefault(a, b) != b:
                raise NotOptional
        elif a != moved:
            raise NotOptional


def with_segments(resolved: Resolved, segments: Sequence[Segment]) -> Resolved:
    """Put the calls of every segment into a group of its own, to be folded into one call.

    Raises:
        NotOptional: two segments have calls in common, or a check needs values of a segment and of what follows.
    """
    if not segments:
        return resolved
    groups = dict(resolved.groups)
    calls = list(resolved.calls)
    numbers: dict[int, Segment] = {}
    for segment in segments:
        number = max([*groups, *numbers], default=-1) + 1
        numbers[number] = segment
        for index in range(segment.start, segment.end):
            if calls[index].group is not None:
                raise NotOptional
            calls[index] = replace(calls[index], group=number)
    calls, new = _checks_in_place(calls)
    leaves = map_values(lambda leaf: _moved(leaf, new), list(resolved.leaves))
    groups.update({number: {"segment": _moved_segment(segment, new)} for number, segment in numbers.items()})
    return replace(resolved, calls=calls, leaves=leaves, groups=groups)


def _checks_in_place(calls: list[Call]) -> tuple[list[Call], dict[int, int]]:
    """Move the checks of sizes at the end to what they look at, so that they are made where that is made."""
    checks: dict[int, list[Call]] = {}
    for call in calls:
        if isinstance(call.target, Guarded):
            seen = [ref.index for leaf in call.args if isinstance(leaf, Expr) for ref in leaf.refs()]
            last = max(seen, default=0)
            if any(calls[index].group not in (None, calls[last].group) for index in seen):
                raise NotOptional
            checks.setdefault(last, []).append(replace(call, group=calls[last].group))
    placed: list[Call] = []
    new: dict[int, int] = {}
    for index, call in enumerate(calls):
        if not isinstance(call.target, Guarded):
            new[index] = len(placed)
            placed += [call, *checks.get(index, [])]
    moved = [
        replace(
            call,
            args=map_values(lambda leaf: _moved(leaf, new), tuple(call.args)),
            kwargs=map_values(lambda leaf: _moved(leaf, new), dict(call.kwargs)),
        )
        for call in placed
    ]
    return moved, new


def _moved(leaf: Any, new: dict[int, int]) -> Any:
    if isinstance(leaf, Ref):
        return Ref(new[leaf.index], leaf.path)
    return Expr(leaf.name, tuple(_moved(arg, new) for arg in leaf.args)) if isinstance(leaf, Expr) else leaf


def _moved_segment(segment: Segment, new: dict[int, int]) -> Segment:
    instead = {_moved(a, new): _moved(b, new) for a, b in segment.instead.items()}
    return replace(segment, condition=_moved(segment.condition, new), instead=instead)
