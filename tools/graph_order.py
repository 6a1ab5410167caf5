"""The order of boxes: a line, a column and a row for each, such that every edge reads forward."""

from __future__ import annotations

from collections.abc import Sequence

PER_LINE = 10


def place(bands: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Give each box its line, column and row: within a band an edge leads to a later column or line."""
    layers = _layers(bands, edges)
    cells: list[tuple[int, int, int]] = [(0, 0, 0)] * len(bands)
    first_line = 0
    for band in sorted(set(bands)):
        mine = [box for box in range(len(bands)) if bands[box] == band]
        depth = 1 + max(layers[box] for box in mine)
        n_lines = -(-depth // PER_LINE)
        per_line = -(-depth // n_lines)
        for layer, boxes in _rows(mine, layers, edges).items():
            for row, box in enumerate(boxes):
                cells[box] = (first_line + layer // per_line, layer % per_line, row)
        first_line += n_lines
    return cells


def _layers(bands: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[int]:
    """Return each box's layer: the longest path to it in its band; what nothing in its band leads to is put late."""
    inside: list[list[int]] = [[] for _ in bands]
    waiting = [0] * len(bands)
    for source, target in edges:
        if bands[source] == bands[target]:
            inside[source].append(target)
            waiting[target] += 1
    starts = [box for box, n in enumerate(waiting) if n == 0]
    layers = [0] * len(bands)
    ready = list(starts)
    while ready:
        box = ready.pop()
        for target in inside[box]:
            layers[target] = max(layers[target], layers[box] + 1)
            waiting[target] -= 1
            if waiting[target] == 0:
                ready.append(target)
    assert not any(waiting), "edges form a circle"
    for box in starts:
        layers[box] = max(0, min((layers[target] for target in inside[box]), default=1) - 1)
    return layers


def _rows(mine: list[int], layers: list[int], edges: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """Order the boxes of each layer by the mean row of what leads to them, then of what they lead to."""
    by_layer: dict[int, list[int]] = {}
    for box in sorted(mine, key=lambda box: (layers[box], box)):
        by_layer.setdefault(layers[box], []).append(box)
    row = {box: float(index) for boxes in by_layer.values() for index, box in enumerate(boxes)}
    before: dict[int, list[int]] = {box: [] for box in mine}
    after: dict[int, list[int]] = {box: [] for box in mine}
    for source, target in edges:
        if source in row and target in row:
            before[target].append(source)
            after[source].append(target)
    forward = sorted(by_layer)
    for near, order in ((before, forward), (after, forward[::-1]), (before, forward)):
        for layer in order:
            rank = {box: _mean([row[n] for n in near[box]], row[box]) for box in by_layer[layer]}
            by_layer[layer].sort(key=lambda box: (rank[box], box))
            row.update((box, float(index)) for index, box in enumerate(by_layer[layer]))
    return by_layer


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default
