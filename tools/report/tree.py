"""The tree of modules that the report folds and unfolds: no node has more children than can be looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...partitioner.plan import OpRecord, Plan

MAX_CHILDREN = 60
STAGE, MODULE, RUN, PART = "stage", "module", "run", "part"


@dataclass(frozen=True)
class Node:
    """What is drawn as one box while it is folded.

    A *stage*, a *module* in it, a *run* of like modules that follow each other, or a *part*: ops or modules that have
    nothing in common but that they follow each other. ``parent`` is its place in the list, -1 for a stage;
    ``copies`` the modules of a run.
    """

    kind: str
    label: str
    parent: int
    copies: int = 1


@dataclass(frozen=True)
class Tree:
    """The nodes, parents before children, and the node that each op lies in."""

    nodes: tuple[Node, ...]
    node_of: tuple[int, ...]


@dataclass
class _Module:
    """A module in one stage: its ops, and the modules in it, in the order of the graph."""

    path: str = ""
    items: list[int | _Module] = field(default_factory=list)
    inside: dict[str, _Module] = field(default_factory=dict)
    ops: list[int] = field(default_factory=list)


def tree_of(plan: Plan) -> Tree:
    """Make the tree of ``plan``; O(ops x depth of the modules).

    Modules are like each other if they have the same ops (target, place in the module, bytes) in the same order.
    """
    building = _Building(plan.ops)
    tops = [_Module() for _ in plan.stages]
    for index, op in enumerate(plan.ops):
        _insert(tops[op.stage], op, index)
    for stage, top in zip(plan.stages, tops):
        building.add(top, Node(STAGE, f"stage {stage.index}", -1))
    return Tree(tuple(building.nodes), tuple(building.node_of))


def _insert(top: _Module, op: OpRecord, index: int) -> None:
    at = top
    at.ops.append(index)
    for part in op.module_path.split(".") if op.module_path else []:
        inner = at.inside.get(part)
        if inner is None:
            inner = at.inside[part] = _Module(f"{at.path}.{part}" if at.path else part)
            at.items.append(inner)
        at = inner
        at.ops.append(index)
    at.items.append(index)


class _Building:
    def __init__(self, ops: Sequence[OpRecord]) -> None:
        self.ops = ops
        self.nodes: list[Node] = []
        self.node_of = [-1] * len(ops)

    def add(self, module: _Module, node: Node) -> None:
        self.nodes.append(node)
        self._children(self._in_runs(module), len(self.nodes) - 1)

    def _in_runs(self, module: _Module) -> list[list[int | _Module]]:
        """Put like modules that follow each other into one list; everything else is alone in its own."""
        groups: list[list[int | _Module]] = []
        last = ""
        for item in module.items:
            likeness = self._likeness(item) if isinstance(item, _Module) and len(item.ops) > 1 else ""
            if likeness and likeness == last:
                groups[-1].append(item)
            else:
                groups.append([item])
            last = likeness
        return groups

    def _likeness(self, module: _Module) -> str:
        digest = hashlib.sha256()
        for index in module.ops:
            op, start = self.ops[index], len(module.path)
            target = "" if op.target == op.module_path else op.target
            digest.update(f"{op.module_path[start:]}\0{target}\0{op.output_bytes}\0{op.saved_bytes}\n".encode())
        return digest.hexdigest()

    def _children(self, groups: Sequence[list[int | _Module]], parent: int) -> None:
        if len(groups) > MAX_CHILDREN:
            size = max(-(-len(groups) // MAX_CHILDREN), MAX_CHILDREN // 2)
            for first in range(0, len(groups), size):
                part = groups[first : first + size]
                self.nodes.append(Node(PART, self._label(part), parent))
                self._children(part, len(self.nodes) - 1)
            return
        for group in groups:
            self._group(group, parent)

    def _group(self, group: list[int | _Module], parent: int) -> None:
        item = group[0]
        if len(group) > 1:
            self.nodes.append(Node(RUN, self._label([group]), parent, len(group)))
            self._children([[module] for module in group], len(self.nodes) - 1)
        elif isinstance(item, int):
            self.node_of[item] = parent
        elif len(item.ops) == 1:  # a module of one op is drawn as that op
            self.node_of[item.ops[0]] = parent
        else:
            self.add(item, Node(MODULE, item.path, parent))

    def _label(self, groups: Sequence[list[int | _Module]]) -> str:
        first, last = groups[0][0], groups[-1][-1]
        return _from_to(*(self.ops[end].name if isinstance(end, int) else end.path for end in (first, last)))


def _from_to(first: str, last: str) -> str:
    """Name what follows each other by its ends.

    >>> _from_to("encoder.layers.0", "encoder.layers.5")
    'encoder.layers.0 … 5'
    """
    parts, others = first.split("."), last.split(".")
    same = next((i for i, pair in enumerate(zip(parts, others)) if pair[0] != pair[1]), 0)
    return f"{first} … {'.'.join(others[same:])}"
