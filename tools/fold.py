"""Folding: the ops of a plan become few enough boxes to look at, by module, and the boxes stay without cycles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..partitioner.plan import OpRecord, Plan

MAX_BOXES = 150
INPUT, OP, MODULE = "input", "op", "module"


@dataclass(frozen=True)
class Box:
    """What is drawn as one: a graph input, an op, or the ops of a module that run on one stage.

    ``label`` is the module's path, or what an op computes (the first op, where ops of the model itself are folded).
    """

    kind: str
    label: str
    stage: int
    ops: tuple[str, ...]
    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class Arrow:
    """Values that go from one box to another.

    ``n_bytes`` is what this arrow adds to the traffic between two stages: a value that goes to several boxes of one
    stage crosses once and is counted at the first of them; 0 inside a stage.
    """

    source: int
    target: int
    values: tuple[str, ...]
    n_bytes: int


@dataclass(frozen=True)
class Folded:
    """The boxes in graph order, the arrows between them, and how much was folded.

    ``depth`` is the number of parts of a module path that are told apart; None if no module is folded.
    """

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    depth: int | None


def foldings(plan: Plan, max_boxes: int = MAX_BOXES) -> Iterator[Folded]:
    """Fold modules more and more, from what ``max_boxes`` allows down to a box or a few for each stage.

    The ops of a box form a convex set within one stage, so arrows never run in a circle; a module whose ops surround
    other ops becomes several boxes. The coarsest folding is given even where it has more boxes than allowed.
    O(ops x boxes) for each folding.
    """
    last: list[int] = []
    depths = list(_depths(plan))
    for index, (depth, loose) in enumerate(depths):
        if index < len(depths) - 1 and _n_keys(plan, depth, loose) > max_boxes:
            continue  # it has a box for each of them at least
        boxes = _group(plan, depth, loose)
        if (len(set(boxes)) <= max_boxes and boxes != last) or index == len(depths) - 1:
            yield _folded(plan, boxes, depth)
            last = boxes


def _depths(plan: Plan) -> Iterator[tuple[int | None, bool]]:
    """Give the foldings from fine to coarse: none, then each depth with the ops of shallower modules loose or not.

    Of loose ops those that cost no time (shapes, checks, indexing) are folded all the same.
    """
    yield None, True
    for depth in range(max((len(_parts(op)) for op in plan.ops), default=0), -1, -1):
        yield depth, True
        yield depth, False


def _key(op: OpRecord, depth: int | None, loose: bool) -> str:
    parts = _parts(op)
    costs_time = op.forward_s + op.backward_s > 0
    alone = depth is None or (loose and len(parts) < depth and costs_time)
    return f":{op.name}" if alone else ".".join(parts[:depth])


def _n_keys(plan: Plan, depth: int | None, loose: bool) -> int:
    return len({(op.stage, _key(op, depth, loose)) for op in plan.ops})


def _parts(op: OpRecord) -> list[str]:
    return op.module_path.split(".") if op.module_path else []


def _group(plan: Plan, depth: int | None, loose: bool) -> list[int]:
    """Give each op a box: the last one of its key and stage, unless that closes a circle.

    ``above[b]`` is the set of boxes, as bits, from which box ``b`` can be reached.
    """
    box_of: dict[str, int] = {}
    newest: dict[tuple[int, str], int] = {}
    above: list[int] = []
    for op in plan.ops:
        inputs: set[int | None] = {box_of[name] for name in op.inputs if name in box_of}
        place = (op.stage, _key(op, depth, loose))
        box = newest.get(place)
        gained = _reached_from(above, inputs - {box})
        if box is None or gained >> box & 1:
            box = newest[place] = len(above)
            above.append(_reached_from(above, inputs))
        elif gained & ~above[box]:
            above[:] = [old | gained if b == box or old >> box & 1 else old for b, old in enumerate(above)]
        box_of[op.name] = box
    return list(box_of.values())


def _reached_from(above: list[int], boxes: Iterable[int | None]) -> int:
    found = 0
    for box in boxes:
        if box is not None:
            found |= above[box] | 1 << box
    return found


def _folded(plan: Plan, box_of_op: list[int], depth: int | None) -> Folded:
    members: dict[int, list[OpRecord]] = {}
    for op, box in zip(plan.ops, box_of_op):
        members.setdefault(box, []).append(op)
    boxes = _input_boxes(plan)
    place = {box.ops[0] + f"@{box.stage}": index for index, box in enumerate(boxes)}
    index_of: dict[str, int] = {}
    for number in members:
        index_of.update((op.name, len(boxes)) for op in members[number])
        boxes.append(_box(members[number], depth))
    return Folded(tuple(boxes), _arrows(plan, boxes, index_of, place), depth)


def _input_boxes(plan: Plan) -> list[Box]:
    """Make a box for each graph input on each stage that uses it: the runtime hands inputs to all of them."""
    users = {(op.stage, name) for op in plan.ops for name in op.inputs if name in set(plan.graph_inputs)}
    order = {name: index for index, name in enumerate(plan.graph_inputs)}
    return [Box(INPUT, name, s, (name,), 0.0, 0.0) for s, name in sorted(users, key=lambda u: (u[0], order[u[1]]))]


def _box(ops: list[OpRecord], depth: int | None) -> Box:
    first = ops[0]
    single = len(ops) == 1
    is_module = first.target == first.module_path or not single
    label = first.module_path if single else _common([op.module_path for op in ops])
    if (single and not is_module) or not label:
        label = first.target.rpartition(".")[2] + ("" if single else ", …")
    return Box(
        kind=MODULE if is_module else OP,
        label=label,
        stage=first.stage,
        ops=tuple(op.name for op in ops),
        forward_s=sum(op.forward_s for op in ops),
        backward_s=sum(op.backward_s for op in ops),
    )


def _common(paths: list[str]) -> str:
    """Return the longest path that all ``paths`` are at or below.

    >>> _common(["blocks.0.conv1", "blocks.0", "blocks.0.norm1"])
    'blocks.0'
    """
    parts = [path.split(".") if path else [] for path in paths]
    same = 0
    while all(len(p) > same and p[same] == parts[0][same] for p in parts):
        same += 1
    return ".".join(parts[0][:same])


def _arrows(plan: Plan, boxes: list[Box], index_of: dict[str, int], inputs: dict[str, int]) -> tuple[Arrow, ...]:
    values: dict[tuple[int, int], dict[str, int]] = {}
    crossed: set[tuple[str, int]] = set()
    n_bytes = {wire.value: wire.n_bytes for wire in plan.wires}
    for op in plan.ops:
        target = index_of[op.name]
        for name in op.inputs:
            source = index_of.get(name, inputs.get(f"{name}@{op.stage}", -1))
            if source == target:
                continue
            own = values.setdefault((source, target), {})
            if boxes[source].stage != op.stage and (name, op.stage) not in crossed:
                crossed.add((name, op.stage))
                own[name] = n_bytes.get(name, 0)
            own.setdefault(name, 0)
    return tuple(Arrow(s, t, tuple(own), sum(own.values())) for (s, t), own in values.items())
