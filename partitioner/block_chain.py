"""The best chain of stages through a large table of boundaries: the minimax dynamic programme, block by block."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .boundaries import Boundaries
from .reduction import Floats, Ints
from .slots import Slots, Step

Flags = NDArray[np.bool_]
_EARLY, _LATE = 128, 1024  # rows of a block
_LAZY = 16  # pairs per column that are looked at one by one


@dataclass(frozen=True)
class RowChain:
    """A chain as rows of the table: where each stage ends, the class of its device, and the largest load."""

    rows: tuple[int, ...]
    classes: tuple[int, ...]
    max_load_s: float


def best_row_chain(
    table: Boundaries, slots: Slots, alive: Flags, limit_s: float, check_time: Callable[[], None]
) -> RowChain | None:
    """Find the chain from the empty to the full set with the smallest largest load, strictly below the limit.

    Loads are those of ``chain.best_chain``; ``alive`` (rows, states) says which boundary can have which state.
    O(pairs of boundaries of consecutive states x (1 + nets that both cut)), in operations on blocks of pairs.
    """
    programme = _Programme(table, slots, limit_s)
    if not programme.enter(alive):
        return None
    level = slots.used.sum(axis=1)
    for index in sorted(range(len(slots.steps)), key=lambda index: int(level[slots.steps[index].source])):
        programme.take_step(index, alive, check_time)
    return programme.read()


class _Programme:
    """``value[state, row]``: the smallest largest load of a chain that ends in that state with that boundary."""

    def __init__(self, table: Boundaries, slots: Slots, limit_s: float) -> None:
        shape = (len(slots.used), len(table))
        self.table, self.slots, self.limit_s = table, slots, limit_s
        self.value = np.full(shape, np.inf)
        self.parent = np.full(shape, -1, dtype=np.int32)
        self.via = np.full(shape, -1, dtype=np.int32)
        self.barring = set(np.nonzero(table.barred)[1].tolist())  # the kinds that some node cannot run on
        self.by_weight = np.argsort(table.least_s, kind="stable")
        self.slack_s = 1e-11 * (float(table.least_s.max(initial=0.0)) + limit_s)

    def enter(self, alive: Flags) -> bool:
        """Start with the empty set; tell whether it is in the table."""
        first = bool(len(self.table)) and self.table.segment[0] == 0 and not self.table.local[0].any()
        if first and alive[0, 0]:
            self.value[0, 0] = 0.0
        return first

    def take_step(self, index: int, alive: Flags, check_time: Callable[[], None]) -> None:
        """Extend every chain that ends in the step's source state by one stage."""
        step, weight = self.slots.steps[index], self.table.least_s
        early = self.by_weight[self.value[step.source, self.by_weight] < np.inf]
        late = self.by_weight[alive[self.by_weight, step.target]]
        late_weight = weight[late]
        for i in range(0, len(early), _EARLY):
            some = early[i : i + _EARLY]
            low = np.searchsorted(late_weight, weight[some[0]] - self.slack_s)
            high = np.searchsorted(late_weight, weight[some[-1]] + self.limit_s + self.slack_s, side="right")
            for j in range(int(low), int(high), _LATE):
                check_time()
                self._relax(index, some, late[j : min(j + _LATE, int(high))])

    def _relax(self, index: int, early: Ints, late: Ints) -> None:
        """Try the stages between all pairs of a block.

        Whether two downsets of one segment are nested is only looked at for pairs that would be taken.
        """
        step, table = self.slots.steps[index], self.table
        value = np.maximum(self._loads_s(early, late, step), self.value[step.source, early, None])
        columns = np.arange(len(late))
        for attempt in itertools.count():
            part = value if len(columns) == len(late) else value[:, columns]
            best = part.argmin(axis=0)
            least = part[best, np.arange(len(columns))]
            better: Flags = least < np.minimum(self.value[step.target, late[columns]], self.limit_s)
            best, least, columns = best[better], least[better], columns[better]
            nested = _nested(table, early[best], late[columns])
            taken = late[columns[nested]]
            self.value[step.target, taken] = least[nested]
            self.parent[step.target, taken] = early[best[nested]]
            self.via[step.target, taken] = index
            apart = np.flatnonzero(~nested)
            value[best[apart], columns[apart]] = np.inf
            columns = columns[apart]
            if not len(columns):
                return
            if attempt == _LAZY:
                value[:, columns] = np.where(_nested(table, early[:, None], late[columns]), value[:, columns], np.inf)

    def _loads_s(self, early: Ints, late: Ints, step: Step) -> Floats:
        """The load of the stage between each early and each late boundary; infinite where there is none."""
        table, kind, device = self.table, self.slots.kind_of[step.c], self.slots.device(step.c)
        load: Floats = table.time_s[late, kind] - table.time_s[early, kind, None]
        if device.pays_transfers:
            load += table.cut_s[late]
            load += table.cut_s[early, None]
            load -= _shared_s(table, early, late)
        if kind in self.barring:
            load[table.barred[early, None, kind] != table.barred[late, kind]] = np.inf
        if self.slots.exact and not table.working[late].min() > table.working[early].max():
            load[table.working[early, None] >= table.working[late]] = np.inf
        if device.memory_bytes is not None:
            static, stash = ((table.bytes[late, c] - table.bytes[early, c, None]) for c in range(2))
            load[static + step.in_flight * stash > device.memory_bytes * (1 + 1e-12)] = np.inf
        return load

    def read(self) -> RowChain | None:
        """Follow the parents back from the full set."""
        row = len(self.table) - 1
        full = self.table.inside(row).all()
        state = min(self.slots.finals, key=lambda s: self.value[s, row])
        if not full or not self.value[state, row] < np.inf:
            return None
        max_load_s = float(self.value[state, row])
        rows: list[int] = []
        classes: list[int] = []
        while self.via[state, row] >= 0:
            step = self.slots.steps[self.via[state, row]]
            rows.append(row)
            classes.append(step.c)
            row, state = int(self.parent[state, row]), step.source
        return RowChain(tuple(rows[::-1]), tuple(classes[::-1]), max_load_s)


def _nested(table: Boundaries, early: Ints, late: Ints) -> Flags:
    """Whether each early downset is a proper subset of the late one, in shapes that broadcast."""
    nested: Flags = np.asarray(table.segment[early] < table.segment[late])
    same = (table.segment[early] == table.segment[late]) & (early != late)
    if same.any():
        for w in range(table.local.shape[1]):
            same &= (table.local[early, w] & ~table.local[late, w]) == 0
    nested |= same
    return nested


def _shared_s(table: Boundaries, early: Ints, late: Ints) -> Floats | float:
    """Seconds of the nets that both boundaries cut, twice if the stage between holds no node of the net.

    Nets that look the same from all rows add a constant.  For the others, both parts are products of two matrices,
    with a column per net and one per net and number of nodes inside.
    """
    parts = [_entries(table, rows) for rows in (early, late)]
    common = np.intersect1d(parts[0][1], parts[1][1])
    if not len(common):
        return 0.0
    (row, net, count), (other_row, other_net, other_count) = (_among(part, common) for part in parts)
    common_s = table.segments.dag.net_s[common]
    inside, same = _uniform(net, count, len(early), len(common))
    other_inside, other_same = _uniform(other_net, other_count, len(late), len(common))
    uniform = same & other_same
    constant_s = float((common_s * (1 + (inside == other_inside)))[uniform].sum())
    if uniform.all():
        return constant_s
    kept, other_kept = ~uniform[net], ~uniform[other_net]
    row, net, count = row[kept], net[kept], count[kept]
    other_row, other_net, other_count = other_row[other_kept], other_net[other_kept], other_count[other_kept]
    column = np.cumsum(~uniform) - 1
    n_columns = int(column[-1]) + 1
    scale = 1 + max(int(count.max()), int(other_count.max()))
    key, other_key = net * scale + count, other_net * scale + other_count
    keys = np.intersect1d(key, other_key)
    left = np.zeros((len(early), n_columns + len(keys)))
    right = np.zeros((len(late), left.shape[1]))
    left[row, column[net]] = common_s[net]
    right[other_row, column[other_net]] = 1.0
    known, at = _find(keys, key)
    left[row[known], n_columns + at] = common_s[net[known]]
    known, at = _find(keys, other_key)
    right[other_row[known], n_columns + at] = 1.0
    return left @ right.T + constant_s


def _uniform(net: Ints, count: Ints, n_rows: int, n_nets: int) -> tuple[Ints, Flags]:
    """Per net the nodes inside, and whether all rows cut the net and agree on that number."""
    inside = np.zeros(n_nets, dtype=np.int64)
    inside[net] = count
    differ = np.zeros(n_nets, dtype=np.bool_)
    differ[net[count != inside[net]]] = True
    return inside, ~differ & (np.bincount(net, minlength=n_nets) == n_rows)


def _find(keys: Ints, wanted: Ints) -> tuple[Flags, Ints]:
    """Which of the wanted keys are there, and where these are."""
    at = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    known: Flags = keys[at] == wanted if len(keys) else np.zeros(len(wanted), dtype=np.bool_)
    return known, at[known]


def _entries(table: Boundaries, rows: Ints) -> tuple[Ints, Ints, Ints]:
    """The nets that some rows cut: position in ``rows``, net, nodes inside."""
    start, size = table.start[rows], table.start[rows + 1] - table.start[rows]
    first = np.cumsum(size) - size
    entries = np.repeat(start - first, size) + np.arange(int(size.sum()))
    return np.repeat(np.arange(len(rows)), size), table.net[entries], table.count[entries]


def _among(part: tuple[Ints, Ints, Ints], common: Ints) -> tuple[Ints, Ints, Ints]:
    """Keep the entries of some nets, and number these nets from 0."""
    row, net, count = part
    known, at = _find(common, net)
    return row[known], at, count[known]
