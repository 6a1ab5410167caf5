"""Layout: boxes in bands, read like text, and orthogonal routes between them that cross no box.

A band (a stage) is one or more lines of boxes; a column of a line is one layer of the longest path. Above each line is
a channel for horizontal runs, between columns a gap for vertical ones, and at the right edge a margin for runs that
pass whole lines:

    channel   ┌──────────┐
    line   [ a ] ─[ b ]─[ c ]─┐   gap, then margin
    channel ┌─────────────────┘
    line   [ d ] ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .graph_order import place

BOX_WIDTH, BOX_HEIGHT = 104.0, 32.0
GAP = 20.0
ROW_GAP = 7.0
_CHANNEL_PAD = 7.0
_TRACK = 5.0
_LABELLED_TRACK = 16.0
_MARGIN_TRACK = 6.0
_STEP = 2.5
_MAX_STEPS = 2


@dataclass(frozen=True)
class Rect:
    """A rectangle; ``y`` grows downwards."""

    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: Rect) -> bool:
        """Say whether the insides meet.

        >>> Rect(0, 0, 2, 2).overlaps(Rect(1, 1, 2, 2)), Rect(0, 0, 2, 2).overlaps(Rect(2, 0, 2, 2))
        (True, False)
        """
        across = self.x < other.x + other.width and other.x < self.x + self.width
        return across and self.y < other.y + other.height and other.y < self.y + self.height


@dataclass(frozen=True)
class Route:
    """The corners of an edge from its source's right side to its target's left side, and the left end of its label."""

    points: tuple[tuple[float, float], ...]
    label_at: tuple[float, float] | None


@dataclass(frozen=True)
class GraphLayout:
    """Where everything is.

    ``cells`` are (line, column, row) of each box; ``bands`` leave out the labelled runs that lead into them.
    """

    boxes: tuple[Rect, ...]
    cells: tuple[tuple[int, int, int], ...]
    bands: tuple[Rect, ...]
    routes: tuple[Route, ...]
    width: float
    height: float


Key = tuple[int, int, bool]


@dataclass(frozen=True)
class Run:
    """One horizontal run of an edge in a channel; runs of one source in one channel are drawn as one line."""

    channel: int
    source: int
    labelled: bool
    start: float
    end: float


def layout(bands: Sequence[int], edges: Sequence[tuple[int, int]], label_widths: Mapping[int, float]) -> GraphLayout:
    """Place boxes and route edges.

    ``bands`` holds the band of each box (0, 1, … without holes), ``label_widths`` the space that the label of an edge
    (by its index) needs. Edges lead to a later band, or go without a circle within one. Deterministic.
    """
    return _Drawing(bands, edges, label_widths, place(bands, edges)).layout()


class _Drawing:
    """Turns cells into coordinates: tracks for the runs of each channel first, then lines, then routes."""

    def __init__(
        self,
        bands: Sequence[int],
        edges: Sequence[tuple[int, int]],
        label_widths: Mapping[int, float],
        cells: list[tuple[int, int, int]],
    ) -> None:
        self.bands, self.edges, self.label_widths, self.cells = bands, edges, label_widths, cells
        self.n_lines = 1 + max((line for line, _, _ in cells), default=0)
        self.right = (1 + max((column for _, column, _ in cells), default=0)) * (BOX_WIDTH + GAP) + GAP / 2
        self.lane_of = self._lanes()
        self.track_of, self.cut_heights, self.channel_heights = self._tracks()
        self.line_tops = self._line_tops()

    def layout(self) -> GraphLayout:
        boxes = tuple(self._box(box) for box in range(len(self.cells)))
        routes = tuple(self._route(index) for index in range(len(self.edges)))
        width = self.right + _MARGIN_TRACK * (1 + max(self.lane_of.values(), default=-1)) + GAP / 2
        labels = [r.label_at[0] + self.label_widths[i] for i, r in enumerate(routes) if r.label_at is not None]
        width = max([width, *labels])
        bands = tuple(self._band(band, boxes, width) for band in sorted(set(self.bands)))
        height = max((band.y + band.height for band in bands), default=0.0)
        return GraphLayout(boxes, tuple(self.cells), bands, routes, width, height)

    def _box(self, box: int) -> Rect:
        line, column, row = self.cells[box]
        y = self.line_tops[line] + row * (BOX_HEIGHT + ROW_GAP)
        return Rect(GAP / 2 + column * (BOX_WIDTH + GAP), y, BOX_WIDTH, BOX_HEIGHT)

    def _band(self, band: int, boxes: Sequence[Rect], width: float) -> Rect:
        mine = [boxes[box] for box in range(len(boxes)) if self.bands[box] == band]
        first = min(self.cells[box][0] for box in range(len(boxes)) if self.bands[box] == band)
        top = self.line_tops[first] - self.channel_heights[first] + self.cut_heights[first]
        bottom = max(box.y + box.height for box in mine) + ROW_GAP / 2
        return Rect(0.0, top, width, bottom - top)

    def _exit_x(self, box: int) -> float:
        _, column, row = self.cells[box]
        return GAP / 2 + column * (BOX_WIDTH + GAP) + BOX_WIDTH + 4 + _STEP * min(row, _MAX_STEPS)

    def _entry_x(self, box: int) -> float:
        _, column, row = self.cells[box]
        return GAP / 2 + column * (BOX_WIDTH + GAP) - 4 - _STEP * min(row, _MAX_STEPS)

    def _is_direct(self, edge: int) -> bool:
        (line, column, _), (to_line, to_column, _) = (self.cells[box] for box in self.edges[edge])
        return line == to_line and to_column == column + 1

    def _lanes(self) -> dict[int, int]:
        """Give each source whose edges pass whole lines a lane in the margin; lanes that do not meet are shared."""
        spans: dict[int, tuple[int, int]] = {}
        for source, target in self.edges:
            start, end = self.cells[source][0] + 1, self.cells[target][0]
            if end > start:
                low, high = spans.get(source, (start, end))
                spans[source] = (min(low, start), max(high, end))
        lanes: dict[int, int] = {}
        for source, span in sorted(spans.items(), key=lambda item: (item[1], item[0])):
            taken = {lanes[other] for other in lanes if spans[other][1] >= span[0] and span[1] >= spans[other][0]}
            lanes[source] = next(lane for lane in range(len(spans)) if lane not in taken)
        return lanes

    def _runs(self, edge: int) -> list[Run]:
        """List the horizontal runs of an edge, from its source on."""
        if self._is_direct(edge):
            return []
        source, target = self.edges[edge]
        line, to_line = self.cells[source][0], self.cells[target][0]
        start, end = self._exit_x(source), self._entry_x(target)
        labelled = edge in self.label_widths
        if to_line <= line + 1:
            return [Run(to_line, source, labelled, start, end)]
        lane = self.right + _MARGIN_TRACK * self.lane_of[source]
        return [Run(line + 1, source, False, start, lane), Run(to_line, source, labelled, lane, end)]

    def _label_x(self, edge: int, run: Run) -> float:
        """Centre a label on its run if it fits, else start at the run's left end."""
        low, high = min(run.start, run.end), max(run.start, run.end)
        return max(low + 4, (low + high - self.label_widths[edge]) / 2)

    def _tracks(self) -> tuple[dict[Key, float], list[float], list[float]]:
        """Give every run a height in its channel such that no two that meet share one; labelled runs lie on top."""
        extents: dict[Key, tuple[float, float]] = {}
        for edge in range(len(self.edges)):
            for run in self._runs(edge):
                low, high = min(run.start, run.end), max(run.start, run.end)
                if run.labelled:
                    high = max(high, self._label_x(edge, run) + self.label_widths[edge])
                key = self._key(run, edge)
                known = extents.get(key, (low, high))
                extents[key] = (min(low, known[0]), max(high, known[1]))
        offsets: dict[Key, float] = {}
        cuts, heights = [], []
        for channel in range(self.n_lines):
            mine = [key for key in extents if key[0] == channel]
            y = _CHANNEL_PAD
            for labelled, pitch in ((True, _LABELLED_TRACK), (False, _TRACK)):
                tracks = _colour({key: extents[key] for key in mine if key[2] is labelled})
                offsets.update((key, y + pitch * (track + 0.5)) for key, track in tracks.items())
                y += pitch * (1 + max(tracks.values(), default=-1))
                if labelled:
                    cuts.append(y)
            heights.append(y + _CHANNEL_PAD / 2)
        return offsets, cuts, heights

    def _key(self, run: Run, edge: int) -> Key:
        """Name a run's line: labelled runs have their own, others share their source's."""
        return (run.channel, edge if run.labelled else run.source, run.labelled)

    def _line_tops(self) -> list[float]:
        rows = [1] * self.n_lines
        for line, _, row in self.cells:
            rows[line] = max(rows[line], row + 1)
        tops, y = [], 0.0
        for line in range(self.n_lines):
            y += self.channel_heights[line]
            tops.append(y)
            y += rows[line] * (BOX_HEIGHT + ROW_GAP) - ROW_GAP
        return tops

    def _route(self, edge: int) -> Route:
        source, target = (self._box(box) for box in self.edges[edge])
        start = (source.x + source.width, source.y + source.height / 2)
        end = (target.x, target.y + target.height / 2)
        points, label_at = [start], None
        for run in self._runs(edge):
            channel_top = self.line_tops[run.channel] - self.channel_heights[run.channel]
            y = channel_top + self.track_of[self._key(run, edge)]
            points += [(run.start, y), (run.end, y)]
            if run.labelled:
                label_at = (self._label_x(edge, run), y)
        if len(points) > 1:
            points = [start, (points[1][0], start[1]), *points[1:], (points[-1][0], end[1])]
        elif edge in self.label_widths:
            label_at = start
        return Route((*points, end), label_at)


def _colour(extents: Mapping[Key, tuple[float, float]]) -> dict[Key, int]:
    """Give runs the smallest number of tracks, by their left ends."""
    tracks: dict[Key, int] = {}
    ends: list[float] = []
    for key, (low, high) in sorted(extents.items(), key=lambda item: (item[1], item[0])):
        track = next((t for t, end in enumerate(ends) if end + 2 < low), len(ends))
        if track == len(ends):
            ends.append(0.0)
        ends[track] = high
        tracks[key] = track
    return tracks
