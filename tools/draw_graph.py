"""The picture of the cut: a band of boxes for each stage, and what crosses from band to band."""

from __future__ import annotations

from ..partitioner.plan import Plan, StageRecord
from .fold import INPUT, Arrow, Box, Folded, foldings
from .graph_layout import GraphLayout, Rect, Route, layout
from .style import stage_class
from .svg_parts import Drawing, path, rect, text, tip_right
from .verdict import bytes_into
from .words import columns, count, device_kinds, duration, n_ops, shorten, size

HEADER = 150.0
_MIN_WIDTH = 1180.0
_MAX_HEIGHT, _MAX_STAGE_HEIGHT = 440.0, 80.0
_LABEL_COLUMNS = 14
_COLUMN = 6.1  # widest mean of a character at 11 px in the fonts of the style sheet
_LISTED = 12


def draw_graph(plan: Plan) -> Drawing:
    """Draw the folded op graph, one band a stage."""
    folded, labels, place = _readable(plan)
    width = max(place.width, _MIN_WIDTH - HEADER)
    parts = [_band(plan, stage, place.bands[stage.index], width) for stage in plan.stages]
    edges = sorted(range(len(folded.arrows)), key=lambda index: (_crosses(folded, folded.arrows[index]), index))
    parts += [_edge(folded, folded.arrows[index], place.routes[index]) for index in edges]
    longest = max((box.forward_s + box.backward_s for box in folded.boxes), default=0.0)
    parts += [_box(box, rectangle, longest) for box, rectangle in zip(folded.boxes, place.boxes)]
    parts += [_tag(labels[index], place, index) for index in sorted(labels)]
    graph = "\n".join(parts)
    foot = text("dim", 0, place.height + 18, _legend(plan, folded))
    return Drawing(HEADER + width, place.height + 24, f'<g transform="translate({HEADER:.0f} 0)">{graph}</g>\n{foot}')


def _readable(plan: Plan) -> tuple[Folded, dict[int, str], GraphLayout]:
    """Lay out the finest folding that is not too high to be looked at in one piece, else the lowest one."""
    limit = max(_MAX_HEIGHT, _MAX_STAGE_HEIGHT * len(plan.stages))
    found: tuple[Folded, dict[int, str], GraphLayout] | None = None
    for folded in foldings(plan):
        labels = {index: size(arrow.n_bytes) for index, arrow in enumerate(folded.arrows) if arrow.n_bytes}
        place = layout(
            [box.stage for box in folded.boxes],
            [(arrow.source, arrow.target) for arrow in folded.arrows],
            {index: columns(label) * _COLUMN + 8 for index, label in labels.items()},
        )
        if found is None or place.height < found[2].height:
            found = folded, labels, place
        if place.height <= limit:
            break
    assert found is not None, "a plan has at least one op"
    return found


def _crosses(folded: Folded, arrow: Arrow) -> bool:
    return folded.boxes[arrow.source].stage != folded.boxes[arrow.target].stage


def _band(plan: Plan, stage: StageRecord, band: Rect, width: float) -> str:
    lines = [
        (f"{count(n_ops(plan, stage.index), 'op')}, {duration(stage.forward_s + stage.backward_s)}", "dim"),
        (f"{size(stage.memory_bytes)} memory", "dim"),
    ]
    x, y = 10 - HEADER, band.y + 16
    parts = [
        rect(f"band {stage_class(stage.index)}", -HEADER, band.y, width + HEADER, band.height, radius=4),
        rect(f"bwd {stage_class(stage.index)}", -HEADER, band.y, 4, band.height),
        f'<text class="h" x="{x:.0f}" y="{y:.1f}">stage {stage.index}</text>',
        text("dim e", -14, y, shorten(device_kinds(stage), 10)),
    ]
    for index, (line, kind) in enumerate(lines[: 1 if band.height < 46 else 2]):
        parts.append(text(kind, x, y + 15 * (index + 1), line))
    into = bytes_into(plan, stage.index)
    stays = stage.index > 0 and plan.stages[stage.index - 1].workers == stage.workers
    if into or stays:
        parts.append(text("b", x, band.y - 6, f"▼ cut: {size(into)} cross" if into else "▼ same device"))
    return "\n".join(parts)


def _edge(folded: Folded, arrow: Arrow, route: Route) -> str:
    crosses = _crosses(folded, arrow)
    names = ", ".join(arrow.values[:_LISTED]) + (" …" if len(arrow.values) > _LISTED else "")
    stages = [folded.boxes[end].stage for end in (arrow.source, arrow.target)]
    tip = f"{names}: stage {stages[0]} to {stages[1]}" if crosses else names
    x, y = route.points[-1]
    line = path("wire" if crosses else "edge", route.points, tip=tip)
    return line + tip_right("wiretip" if crosses else "tip", x, y)


def _tag(label: str, place: GraphLayout, index: int) -> str:
    at = place.routes[index].label_at
    assert at is not None
    width = columns(label) * _COLUMN + 8
    return rect("tag", at[0], at[1] - 7, width, 14, radius=7) + text("b s m", at[0] + width / 2, at[1] + 3.5, label)


def _box(box: Box, place: Rect, longest_s: float) -> str:
    colour = stage_class(box.stage)
    seconds = box.forward_s + box.backward_s
    below = "model input" if box.kind == INPUT else duration(seconds)
    if len(box.ops) > 1:
        below = f"{count(len(box.ops), 'op')}, {below}"
    kind = "input" if box.kind == INPUT else f"box {colour}"
    parts = [
        rect(kind, place.x, place.y, place.width, place.height, radius=3, tip=_tip(box)),
        text("", place.x + 6, place.y + 13, shorten(box.label, _LABEL_COLUMNS)),
        text("dim s", place.x + 6, place.y + 24, below),
    ]
    if longest_s > 0 and seconds > 0:
        parts.append(rect(f"bwd {colour}", place.x, place.y + place.height - 3, place.width * seconds / longest_s, 3))
    return "".join(parts)


def _tip(box: Box) -> str:
    if box.kind == INPUT:
        return f"model input {box.label}, given to stage {box.stage}"
    names = ", ".join(box.ops[:_LISTED])
    more = f" and {len(box.ops) - _LISTED} more" if len(box.ops) > _LISTED else ""
    return (
        f"{box.label} on stage {box.stage}: forward {duration(box.forward_s)}, backward {duration(box.backward_s)}; "
        f"{count(len(box.ops), 'op')}: {names}{more}"
    )


def _legend(plan: Plan, folded: Folded) -> str:
    n_boxes = sum(1 for box in folded.boxes if box.kind != INPUT)
    if n_boxes == len(plan.ops):
        what = f"all {count(n_boxes, 'op')} are shown"
    else:
        what = f"{len(plan.ops)} ops in {count(n_boxes, 'box', 'boxes')}: modules are folded at depth {folded.depth}"
    how = "bars and times are forward and backward of a microbatch; thick lines cross stages, with a microbatch's bytes"
    return f"{what}; {how}"
