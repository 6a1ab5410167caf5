"""The picture of a captured model: its graph, folded by modules, with what was kept whole in a colour of its own."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from ..partitioner.plan import FORMAT, OpRecord, Plan, Prediction
from .fold import INPUT, Box, Folded, foldings
from .graph_layout import GraphLayout, Rect, layout
from .style import stage_class
from .svg_parts import Drawing, document, path, rect, stack, text, tip_right
from .words import count, shorten

if TYPE_CHECKING:
    from torch import fx

    from ..partitioner.captured import Capture

_LABEL_COLUMNS = 14
_MAX_HEIGHT = 440.0
_LISTED = 12
_OPENED, _WHOLE = stage_class(0), stage_class(1)


def capture_svg(capture: Capture) -> str:
    """Draw ``capture`` as a standalone picture; equal captures give equal bytes."""
    name = type(capture.model).__name__
    return document(stack([draw_capture(capture)], margin=14.0), f"{name}: the graph", styled=True)


def draw_capture(capture: Capture) -> Drawing:
    """Draw the op graph, folded until it is not too high to be looked at in one piece."""
    ops = tuple(_ops(capture))
    inputs = tuple(node.name for node in capture.graph.nodes if node.op == "placeholder")
    folded, place = _readable(type(capture.model).__name__, inputs, ops)
    whole = {op.name for op in ops} & capture.kept_whole
    parts = [_edge(folded, index, place) for index in range(len(folded.arrows))]
    parts += [_box(box, rectangle, whole) for box, rectangle in zip(folded.boxes, place.boxes)]
    width = max(place.width, 480.0)
    parts.append(text("dim", 0, place.height + 18, _legend(folded, len(ops), len(whole))))
    return Drawing(width, place.height + 24, "\n".join(parts))


def _ops(capture: Capture) -> list[OpRecord]:
    from ..partitioner.opgraph import is_replicable

    module = capture.graph_module
    through = {node for node in capture.graph.nodes if is_replicable(node, module)}
    return [
        OpRecord(
            name=node.name,
            target=_target(node),
            module_path=_module_path(node),
            source=None,
            stage=0,
            inputs=tuple(dict.fromkeys(source.name for source in _sources(node, through))),
            forward_s=0.0,
            backward_s=0.0,
            output_bytes=0,
            saved_bytes=0,
            cost_source="none",
        )
        for node in capture.graph.nodes
        if node.op not in ("placeholder", "output") and node not in through
    ]


def _sources(node: fx.Node, through: set[fx.Node]) -> list[fx.Node]:
    """List what a node uses; a switch of the mode is passed through, and attributes are left out."""
    found = []
    for source in node.all_input_nodes:
        found += _sources(source, through) if source in through else [source]
    return found


def _target(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _module_path(node: fx.Node) -> str:
    stack_of_modules = node.meta.get("nn_module_stack")
    return str(next(reversed(stack_of_modules.values()))[0]) if stack_of_modules else ""


def _readable(name: str, inputs: tuple[str, ...], ops: tuple[OpRecord, ...]) -> tuple[Folded, GraphLayout]:
    nothing = Prediction(0.0, 0.0, 0.0, 0.0, False, 0.0, "none")
    plan = Plan(FORMAT, name, "", 0, 0, "", inputs, ops, (), (), nothing, ())
    found: tuple[Folded, GraphLayout] | None = None
    for folded in foldings(plan):
        place = layout([0 for _ in folded.boxes], [(arrow.source, arrow.target) for arrow in folded.arrows], {})
        if found is None or place.height < found[1].height:
            found = folded, place
        if place.height <= _MAX_HEIGHT:
            break
    assert found is not None, "there is always a folding"
    return found


def _edge(folded: Folded, index: int, place: GraphLayout) -> str:
    values, points = folded.arrows[index].values, place.routes[index].points
    names = ", ".join(values[:_LISTED]) + (" …" if len(values) > _LISTED else "")
    return path("edge", points, tip=names) + tip_right("tip", *points[-1])


def _box(box: Box, place: Rect, whole: Set[str]) -> str:
    kept = whole & set(box.ops)
    if box.kind == INPUT:
        kind, below = "input", "model input"
    else:
        kind, below = f"box {_WHOLE if kept else _OPENED}", count(len(box.ops), "op")
    below += f", {len(kept)} whole" if kept else ""
    names = ", ".join(box.ops[:_LISTED]) + (f" and {len(box.ops) - _LISTED} more" if len(box.ops) > _LISTED else "")
    return "".join(
        [
            rect(kind, place.x, place.y, place.width, place.height, radius=3, tip=f"{box.label}: {names}"),
            text("", place.x + 6, place.y + 13, shorten(box.label, _LABEL_COLUMNS)),
            text("dim s", place.x + 6, place.y + 24, below),
        ]
    )


def _legend(folded: Folded, n_ops: int, n_whole: int) -> str:
    n_boxes = sum(1 for box in folded.boxes if box.kind != INPUT)
    what = f"{count(n_ops, 'op')} in {count(n_boxes, 'box', 'boxes')}"
    return f"{what}; {count(n_whole, 'op')} kept whole, in orange" if n_whole else what
