"""One list of calls for training and evaluation: calls of both modes once, those of one mode marked as such.

Where a call of both modes is given something else in each, a switch chooses by the mode of the module whose code
decided, when the graph runs. So a part of a model may be in evaluation mode while the rest trains.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .calls import Call, map_values
from .numbers import Expr, Ref
from .resolve import Resolved, common_path

SWITCH = "switch"


@dataclass
class Results:
    """The leaves of a result, and their nesting."""

    leaves: list[Any]
    structure: Any


@dataclass
class United:
    """Calls of both modes in an order that is right for either; ``evaluated`` is None where the results agree."""

    calls: list[Call]
    trained: Results
    evaluated: Results | None


class _Mapping:
    """Where the calls of one mode went."""

    def __init__(self) -> None:
        self.new: dict[int, int] = {}

    def value(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return Ref(self.new[leaf.index], leaf.path)
        return self.expr(leaf) if isinstance(leaf, Expr) else leaf

    def expr(self, expr: Expr) -> Expr:
        return Expr(expr.name, tuple(self.value(arg) for arg in expr.args))


def unite(trained: Resolved, evaluated: Resolved) -> United:
    """Merge the calls of both modes."""
    return _Merge(trained, evaluated).run()


class _Merge:
    def __init__(self, trained: Resolved, evaluated: Resolved) -> None:
        self.trained, self.evaluated = trained, evaluated
        self.shared = trained.entered & evaluated.entered
        self.ours, self.theirs = _Mapping(), _Mapping()
        self.calls: list[Call] = []

    def run(self) -> United:
        for ours, theirs in _aligned(self.trained.calls, self.evaluated.calls):
            if ours and theirs and len(ours) == len(theirs) and _key(ours[0][1]) == _key(theirs[0][1]):
                for (i, a), (j, b) in zip(ours, theirs):
                    self._both(i, a, j, b)
            else:
                self._apart(ours, theirs)
        return self._results()

    def _both(self, i: int, a: Call, j: int, b: Call) -> None:
        left = [map_values(self.ours.value, value) for value in (a.args, a.kwargs)]
        right = [map_values(self.theirs.value, value) for value in (b.args, b.kwargs)]
        if _nesting(left) != _nesting(right) or a.body != b.body:
            self._apart([(i, a)], [(j, b)])
            return
        others: list[Any] = []
        map_values(others.append, right)
        remaining = iter(others)
        args, kwargs = map_values(lambda leaf: self._choose(leaf, next(remaining), a), left)
        self.ours.new[i] = self.theirs.new[j] = len(self.calls)
        self.calls.append(replace(a, args=args, kwargs=kwargs))

    def _choose(self, ours: Any, theirs: Any, call: Call) -> Any:
        if type(ours) is type(theirs) and bool(ours == theirs):
            return ours
        decided = [self.calls[side.index].only for side in (ours, theirs) if isinstance(side, Ref)]
        owner = next((only[0] for only in decided if only is not None), self._decider([call.path]))
        self.calls.append(Call(SWITCH, owner, (ours, theirs), path=call.path, source=call.source))
        return Ref(len(self.calls) - 1)

    def _apart(self, ours: Sequence[tuple[int, Call]], theirs: Sequence[tuple[int, Call]]) -> None:
        for mapping, calls, training in ((self.ours, ours, True), (self.theirs, theirs, False)):
            owner = self._decider([call.path for _, call in calls])
            for index, call in calls:
                args, kwargs = (map_values(mapping.value, value) for value in (call.args, call.kwargs))
                mapping.new[index] = len(self.calls)
                self.calls.append(replace(call, args=args, kwargs=kwargs, only=(owner, training)))

    def _decider(self, paths: list[str]) -> str:
        """Name the module whose code decided that calls at ``paths`` are made: one that runs in both modes."""
        owner = common_path(*paths) if paths else ""
        while owner and owner not in self.shared:
            owner = owner.rpartition(".")[0]
        return owner

    def _results(self) -> United:
        ours = [self.ours.value(leaf) for leaf in self.trained.leaves]
        theirs = [self.theirs.value(leaf) for leaf in self.evaluated.leaves]
        if self.trained.structure != self.evaluated.structure or any(
            isinstance(a, (Ref, Expr)) != isinstance(b, (Ref, Expr)) for a, b in zip(ours, theirs)
        ):
            evaluated = Results(theirs, self.evaluated.structure)
            return United(self.calls, Results(ours, self.trained.structure), evaluated)
        plain = [isinstance(a, (Ref, Expr)) for a in ours]
        if any(not known and not _same(a, b) for known, a, b in zip(plain, ours, theirs)):
            evaluated = Results(theirs, self.evaluated.structure)
            return United(self.calls, Results(ours, self.trained.structure), evaluated)
        end = Call("output", "output")
        leaves = [self._choose(a, b, end) if known else a for known, a, b in zip(plain, ours, theirs)]
        return United(self.calls, Results(leaves, self.trained.structure), None)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _key(call: Call) -> Any:
    return call.op, call.target, call.path, call.region


def _nesting(value: Any) -> str:
    return repr(map_values(lambda _: None, value))


def _aligned(ours: list[Call], theirs: list[Call]) -> list[tuple[list[tuple[int, Call]], list[tuple[int, Call]]]]:
    """Pair runs of calls that are the same in both lists, and runs that are not."""
    left, right = list(enumerate(ours)), list(enumerate(theirs))
    keys: dict[Any, int] = {}
    a = [keys.setdefault(_key(call), len(keys)) for call in ours]
    b = [keys.setdefault(_key(call), len(keys)) for call in theirs]
    start = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    tail = next((n for n, (x, y) in enumerate(zip(a[start:][::-1], b[start:][::-1])) if x != y), None)
    tail = min(len(a), len(b)) - start if tail is None else tail
    end_a, end_b = len(a) - tail, len(b) - tail
    runs = [(left[:start], right[:start])] if start else []
    matcher = difflib.SequenceMatcher(None, a[start:end_a], b[start:end_b], autojunk=False)
    for _, i, i_end, j, j_end in matcher.get_opcodes():
        runs.append((left[start + i : start + i_end], right[start + j : start + j_end]))
    return [*runs, (left[end_a:], right[end_b:])] if tail else runs
