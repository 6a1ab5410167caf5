"""Tables of downsets, as places where a stage may end, with the sums that loads are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .downsets import Words, pack
from .reduction import Dag, Floats, Ints
from .segments import Segments, iterate_crossing
from .slots import Windows

_CHUNK = 4_000_000  # numbers in a temporary array


@dataclass(frozen=True)
class Boundaries:
    """Downsets sorted by segment, and the nets that each of them cuts: rows of a sparse matrix."""

    segments: Segments
    segment: Ints  # (rows,)
    local: Words  # (rows, words): the nodes inside the segment
    weights: Floats  # (rows, q): the windows' measures of the nodes inside
    least_s: Floats  # (rows,)
    time_s: Floats  # (rows, kinds)
    barred: Floats  # (rows, kinds)
    bytes: Floats  # (rows, 2): static, stash
    working: Floats  # (rows,)
    cut_s: Floats  # (rows,)
    start: Ints  # (rows + 1,): where the entries of each row start
    net: Ints  # per entry
    count: Ints  # per entry: nodes of the net inside

    def __len__(self) -> int:
        return len(self.segment)

    def take(self, rows: Ints) -> Boundaries:
        """Keep some rows, given in increasing order."""
        size = np.diff(self.start)[rows]
        start = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
        entries = np.repeat(self.start[rows] - start[:-1], size) + np.arange(start[-1])
        return Boundaries(
            segments=self.segments,
            segment=self.segment[rows],
            local=self.local[rows],
            weights=self.weights[rows],
            least_s=self.least_s[rows],
            time_s=self.time_s[rows],
            barred=self.barred[rows],
            bytes=self.bytes[rows],
            working=self.working[rows],
            cut_s=self.cut_s[rows],
            start=start,
            net=self.net[entries],
            count=self.count[entries],
        )

    @property
    def is_full(self) -> NDArray[np.bool_]:
        """Per row, whether it is the whole graph."""
        last = len(self.segments) - 1
        everything = pack([(1 << self.segments.width(last)) - 1], 64 * self.local.shape[1])
        full: NDArray[np.bool_] = (self.segment == last) & (self.local == everything).all(axis=1)
        return full

    def inside(self, row: int) -> NDArray[np.bool_]:
        """Per node, whether it is in the downset."""
        flags = np.zeros(len(self.segments.dag), dtype=np.bool_)
        t = int(self.segment[row])
        base = int(self.segments.hub[t]) + 1
        flags[:base] = True
        flags[base : int(self.segments.end[t])] = unpack(self.local[row : row + 1], self.segments.width(t))[0]
        return flags


def unpack(words: Words, n: int) -> NDArray[np.uint8]:
    """One number, 0 or 1, per bit: (rows, words) -> (rows, n)."""
    raw = np.ascontiguousarray(words.astype("<u8", copy=False)).view(np.uint8)
    return np.unpackbits(raw, axis=1, count=n, bitorder="little") if n else raw[:, :0]


@dataclass(frozen=True)
class Columns:
    """Additive measures of nodes, and their sums over all prefixes of the numbering."""

    values: Floats  # (n, columns)
    prefix: Floats  # (n + 1, columns)
    n_weights: int
    n_kinds: int


def columns_of(dag: Dag, windows: Windows) -> Columns:
    """Put the windows' measures and what loads are made of side by side."""
    static = (dag.static_bytes[:, None], dag.stash_bytes[:, None], dag.working[:, None])
    values = np.concatenate(
        [windows.weights, dag.time_s, dag.barred, *static, dag.least_s[:, None]], axis=1, dtype=np.float64
    )
    prefix = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
    return Columns(values, prefix, windows.weights.shape[1], dag.time_s.shape[1])


def tabulate(segments: Segments, columns: Columns, choices: Sequence[tuple[int, Words]]) -> Boundaries:
    """Sum up the given downsets, per segment those of its inner nodes; the segments in increasing order.

    O(downsets of a segment x (its nodes + the nets that cross it)).
    """
    n_words = max((words.shape[1] for _, words in choices), default=1)
    sums, local, cut_s, sizes, nets, counts = [], [], [], [], [], []
    rows_of = dict(choices)
    for t, crossing in iterate_crossing(segments, np.array([t for t, _ in choices], dtype=np.int64)):
        flags = unpack(rows_of[t], segments.width(t))
        base, end = int(segments.hub[t]) + 1, int(segments.end[t])
        step = max(1, _CHUNK // (1 + flags.shape[1] + len(crossing)))
        pins = _pins_inside(segments, t, crossing)
        below = segments.nets.count_below(crossing, base)
        for i in range(0, len(flags), step):
            part = flags[i : i + step].astype(np.float64)
            sums.append(columns.prefix[base] + part @ columns.values[base:end])
            count = (below + part @ pins).astype(np.int64)
            cut = (count > 0) & (count < segments.nets.size[crossing])
            cut_s.append(cut @ segments.dag.net_s[crossing])
            sizes.append(cut.sum(axis=1))
            nets.append(np.broadcast_to(crossing, cut.shape)[cut])
            counts.append(count[cut])
        padded = np.zeros((len(flags), n_words), dtype=np.uint64)
        padded[:, : rows_of[t].shape[1]] = rows_of[t]
        local.append(padded)
    q, kinds = columns.n_weights, columns.n_kinds
    total = np.concatenate(sums)
    return Boundaries(
        segments=segments,
        segment=np.repeat([t for t, _ in choices], [len(words) for _, words in choices]).astype(np.int64),
        local=np.concatenate(local),
        weights=total[:, :q],
        time_s=total[:, q : q + kinds],
        barred=total[:, q + kinds : q + 2 * kinds],
        bytes=total[:, -4:-2],
        working=total[:, -2],
        least_s=total[:, -1],
        cut_s=np.concatenate(cut_s),
        start=np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64),
        net=np.concatenate(nets),
        count=np.concatenate(counts),
    )


def _pins_inside(segments: Segments, t: int, crossing: Ints) -> Floats | csr_array:
    """1 where a node inside the segment is in one of the nets."""  # (nodes inside, nets)
    nets, base = segments.nets, int(segments.hub[t]) + 1
    pins = nets.by_node[nets.node_start[base] : nets.node_start[int(segments.end[t])]]
    order = np.argsort(crossing)
    column = order[np.searchsorted(crossing, nets.net_of[pins], sorter=order)]
    rows = nets.pins[pins] - base
    shape = (segments.width(t), len(crossing))
    if shape[0] * shape[1] > _CHUNK // 16:
        return csr_array((np.ones(len(rows)), (rows, column)), shape=shape)
    matrix = np.zeros(shape)
    matrix[rows, column] = 1.0
    return matrix
