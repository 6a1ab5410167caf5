"""Calls that the model made under ``torch.utils.checkpoint``, or makes or leaves out, become one call with a body."""

from __future__ import annotations

from typing import Any

from .calls import Call, map_values
from .forks import Segment
from .numbers import Expr, Ref
from .resolve import Resolved


def fold_checkpoints(resolved: Resolved) -> Resolved:
    """Replace every group of calls by one call; other calls and the result refer to it instead."""
    if all(call.group is None for call in resolved.calls):
        return resolved
    return _Fold(resolved).run()


class _Fold:
    def __init__(self, resolved: Resolved) -> None:
        self.resolved = resolved
        self.new: dict[int, int] = {}
        self.inside: dict[int, tuple[int, int]] = {}
        self.calls: list[Call] = []
        self.last = {call.group: index for index, call in enumerate(resolved.calls) if call.group is not None}

    def run(self) -> Resolved:
        waiting: dict[int, list[int]] = {}
        for index, call in enumerate(self.resolved.calls):
            if call.group is None:
                self._plain(index, call)
                continue
            waiting.setdefault(call.group, []).append(index)
            if self.last[call.group] == index:
                self._group(call.group, waiting.pop(call.group))
        leaves = [self._moved(leaf) for leaf in self.resolved.leaves]
        own = self.resolved
        return Resolved(self.calls, leaves, own.structure, own.objects, own.guards, own.entered, own.groups)

    def _plain(self, index: int, call: Call) -> None:
        self.new[index] = len(self.calls)
        args, kwargs = (map_values(self._moved, value) for value in (call.args, call.kwargs))
        self.calls.append(_with(call, args, kwargs))

    def _moved(self, leaf: Any) -> Any:
        if isinstance(leaf, Expr):
            return Expr(leaf.name, tuple(self._moved(arg) for arg in leaf.args))
        if not isinstance(leaf, Ref):
            return leaf
        if leaf.index in self.new:
            return Ref(self.new[leaf.index], leaf.path)
        home, inner = self.inside[leaf.index]
        results = self.calls[home].results
        reference = Ref(inner, leaf.path)
        if reference not in results:
            results.append(reference)
        return Ref(home, (("item", results.index(reference)),))

    def _group(self, group: int, members: list[int]) -> None:
        """Write the calls ``members`` as the body of one, with what they use from outside as placeholders."""
        outside: list[Ref] = []
        for index in members:
            for value in (self.resolved.calls[index].args, self.resolved.calls[index].kwargs):
                map_values(lambda leaf: _collect(leaf, set(members), outside), value)
        given = [self._moved(ref) for ref in outside]
        place = {ref: Ref(position) for position, ref in enumerate(outside)}
        position = {index: len(outside) + n for n, index in enumerate(members)}

        def inner(leaf: Any) -> Any:
            if isinstance(leaf, Expr):
                return Expr(leaf.name, tuple(inner(arg) for arg in leaf.args))
            if not isinstance(leaf, Ref):
                return leaf
            return Ref(position[leaf.index], leaf.path) if leaf.index in position else place[leaf]

        body = [Call("placeholder", f"value_{n}") for n in range(len(outside))]
        for index in members:
            call = self.resolved.calls[index]
            args, kwargs = (map_values(inner, value) for value in (call.args, call.kwargs))
            body.append(_with(call, args, kwargs))
        first = self.resolved.calls[members[0]]
        segment: Segment | None = self.resolved.groups[group].get("segment")
        if segment is not None:
            self._skippable(segment, given, first, body, position)
            return
        options = tuple(sorted(self.resolved.groups[group].items()))
        home = len(self.calls)
        self.calls.append(Call("checkpoint", options, tuple(given), {}, _owner(first, body), first.source, body=body))
        for index in members:
            self.inside[index] = (home, position[index])

    def _skippable(
        self, segment: Segment, given: list[Any], first: Call, body: list[Call], position: dict[int, int]
    ) -> None:
        """Write calls that are made or left out; what they give is fixed, since each value needs another instead."""
        instead = tuple(self._moved(ref) for ref in segment.instead.values())
        results = [Ref(position[ref.index], ref.path) for ref in segment.instead]
        args = (self._moved(segment.condition), instead, *given)
        home, path = len(self.calls), _owner(first, body)
        self.calls.append(Call("skippable", segment.outcome, args, {}, path, first.source, body=body, results=results))
        for index, place in position.items():
            self.inside[index] = (home, place)


def _owner(first: Call, body: list[Call]) -> str:
    return min((call.path for call in body if call.op != "placeholder"), key=len, default=first.path)


def _with(call: Call, args: Any, kwargs: Any) -> Call:
    return Call(call.op, call.target, args, kwargs, call.path, call.source, call.region, call.shapes)


def _collect(leaf: Any, members: set[int], outside: list[Ref]) -> None:
    for ref in leaf.refs() if isinstance(leaf, Expr) else [leaf] if isinstance(leaf, Ref) else []:
        if ref.index not in members and ref not in outside:
            outside.append(ref)
