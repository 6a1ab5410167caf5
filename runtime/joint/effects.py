"""What ops that change values in place do to the order of a graph: who reads a value depends on who changed it before.

A change may go by another view than the reading: autograd's own formula for a slice that was assigned to writes into a
view of the gradient and goes on with the gradient. So values that may share memory are taken together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx


class Effects:
    """The dependencies of a graph's nodes, changes in place included."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self._memory: dict[fx.Node, frozenset[fx.Node]] = {}  # the values whose memory a node may share
        self.changers: dict[fx.Node, list[fx.Node]] = {}  # of the memory of a value, in order
        self._needed: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            before = [changer for origin in self._touched(node) for changer in self.changers.get(origin, ())]
            self._needed[node] = [*node.all_input_nodes, *before]
            shared = [self._memory[argument] for argument in aliased(node)]
            self._memory[node] = frozenset().union(*shared) if shared else frozenset([node])
            for argument in _changed(node):
                for origin in self._memory[argument]:
                    self.changers.setdefault(origin, []).append(node)

    def _touched(self, node: fx.Node) -> frozenset[fx.Node]:
        return frozenset().union(*(self._memory[argument] for argument in node.all_input_nodes))

    def is_changed(self, node: fx.Node) -> bool:
        """Say whether some op changes the memory of a value in place."""
        return any(self.changers.get(origin) for origin in self._memory[node])

    def needed_by(self, node: fx.Node) -> list[fx.Node]:
        """List what has to run before ``node``."""
        return self._needed[node]

    def ancestors(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return ``nodes``, all that they depend on, and all changes of their own memory."""
        pending = list(nodes)
        pending += [c for node in pending for origin in self._memory[node] for c in self.changers.get(origin, ())]
        found = set(pending)
        while pending:
            fresh = set(self._needed[pending.pop()]) - found
            found |= fresh
            pending += fresh
        return found

    def read_before_changed(self, readers: Iterable[fx.Node], changers: Iterable[fx.Node]) -> fx.Node | None:
        """Return one of ``changers`` that changes in place what one of ``readers`` reads before that, if any does."""
        of: dict[fx.Node, list[fx.Node]] = {}
        for changer in changers:
            for argument in _changed(changer):
                for origin in self._memory[argument]:
                    of.setdefault(origin, []).append(changer)
        for reader in readers:
            for origin in self._touched(reader):
                for changer in of.get(origin, ()):
                    if self.position[reader] < self.position[changer]:
                        return changer
        return None


def aliased(node: fx.Node) -> list[fx.Node]:
    """List the arguments whose memory the results of an op may share."""
    return node.all_input_nodes if node.target is operator.getitem else _marked(node, writes_only=False)


def _changed(node: fx.Node) -> list[fx.Node]:
    """List the arguments that an op changes in place."""
    return _marked(node, writes_only=True)


def _marked(node: fx.Node, writes_only: bool) -> list[fx.Node]:
    """List the arguments that the op's schema marks as shared with its results, or as written to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = node.target._schema.arguments
    given = {**dict(zip((known.name for known in schema), node.args)), **node.kwargs}
    found: list[fx.Node] = []
    for known in schema:
        if known.alias_info is not None and (known.alias_info.is_write or not writes_only):
            fx.node.map_aggregate(given.get(known.name), lambda a: found.append(a) if isinstance(a, fx.Node) else None)
    return found
