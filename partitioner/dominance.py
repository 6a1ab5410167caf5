"""Downsets of a segment with many branches, without those that another one can always stand in for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .boundaries import Boundaries, Columns, tabulate, unpack
from .downsets import Words
from .reduction import Floats, Ints
from .segments import Segments
from .sieve import Flags
from .slots import Slots, Windows

_CHUNK = 16_384


def can_stand_in(segments: Segments, slots: Slots, t: int, states: Flags) -> bool:
    """Tell whether only seconds matter to a boundary inside a segment, and its neighbours lie outside of it.

    Then the stages on both sides hold the hubs around the segment, whichever of its downsets the boundary is.
    """
    dag = segments.dag
    hub, end = int(segments.hub[t]), int(segments.end[t])
    if hub < 0 or end >= len(dag) or dag.time_s.shape[1] > 1 or dag.barred.any():
        return False
    if any(device.memory_bytes is not None or not device.pays_transfers for device in slots.devices):
        return False
    if any(dag.pins[hub : end + 1]) or not (dag.working[hub] and dag.working[end]):
        return False
    return not any(states[step.source] and states[step.target] for step in slots.steps)


def undominated(
    segments: Segments,
    columns: Columns,
    t: int,
    words: Words,
    windows: Windows,
    net_s: Floats,
    check_time: Callable[[], None],
) -> Words:
    """Keep the downsets in the windows (which count ``net_s``) that no other one can stand in for.

    Let w be the weight inside and p the seconds of the nets cut.  The stage before pays w + p and the stage after
    -w + p, and constants, if the nets that it may share with its other boundary are cut alike.  So a downset with no
    larger w + p and no smaller w - p can stand in for another one.  O(downsets x (nodes + nets of the segment)).
    """
    total = windows.weights.sum(axis=0)
    base, end = int(segments.hub[t]) + 1, int(segments.end[t])
    kept, low, high, looks = [words[:0]], [np.zeros(0)], [np.zeros(0)], []
    for i in range(0, len(words), _CHUNK):
        check_time()
        part = words[i : i + _CHUNK]
        flags = unpack(part, segments.width(t)).astype(np.float64)
        weights = columns.prefix[base, : columns.n_weights] + flags @ columns.values[base:end, : columns.n_weights]
        part = part[windows.admit(weights, total - weights, np.zeros(len(part)))]
        if not len(part):
            continue
        table = tabulate(segments, columns, [(t, part)])
        counted = np.concatenate([[0.0], np.cumsum(net_s[table.net])])
        cut_s = counted[table.start[1:]] - counted[table.start[:-1]]
        rows = np.flatnonzero(windows.admit(table.weights, total - table.weights, cut_s))
        kept.append(part[rows])
        low.append((table.least_s + table.cut_s)[rows])
        high.append((table.least_s - table.cut_s)[rows])
        looks.append(_looks(segments, table, t, rows))
    if not looks:
        return words[:0]
    front = _front(np.concatenate(low), np.concatenate(high), np.concatenate(looks))
    found: Words = np.concatenate(kept)[front]
    return found


def _looks(segments: Segments, table: Boundaries, t: int, rows: Ints) -> Ints:
    """What a stage on either side can see: of each net that reaches beyond a hub, how the boundary cuts it.

    If the net holds the hub between, the stage holds a node of it, and all that counts is whether it is cut.
    """
    nets, hub, end = segments.nets, int(segments.hub[t]), int(segments.end[t])
    inner = np.unique(nets.net_of[nets.by_node[nets.node_start[hub + 1] : nets.node_start[end]]])
    beyond = inner[(nets.first[inner] < hub) | (nets.last[inner] > end)]
    flags = unpack(table.local[rows], segments.width(t))
    looks = np.zeros((len(rows), len(beyond)), dtype=np.int64)
    for column, net in enumerate(beyond.tolist()):
        pins = nets.pins[nets.start[net] : nets.start[net + 1]]
        inside = pins[(pins > hub) & (pins < end)] - (hub + 1)
        count = int((pins <= hub).sum()) + flags[:, inside].sum(axis=1, dtype=np.int64)
        held = (pins[0] >= hub or hub in pins) and (pins[-1] <= end or end in pins)
        looks[:, column] = (count > 0) & (count < len(pins)) if held else count
    return looks


def _front(low: Floats, high: Floats, looks: Ints) -> Ints:
    """Per look, the rows that have the largest ``high`` of all rows with no larger ``low``."""
    _, group = np.unique(looks, axis=0, return_inverse=True)
    order = np.lexsort((-high, low, group.reshape(-1)))
    chosen: list[Ints] = []
    ends = np.flatnonzero(np.diff(group.reshape(-1)[order], append=-1)) + 1
    start = 0
    for stop in ends.tolist():
        part = order[start:stop]
        best = np.maximum.accumulate(high[part])
        chosen.append(part[np.concatenate([[True], best[1:] > best[:-1]])])
        start = stop
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)
