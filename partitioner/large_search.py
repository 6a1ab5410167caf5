"""The search for the best cut of a large graph: boundaries are listed segment by segment, and only where they count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .block_chain import RowChain, best_row_chain
from .boundaries import Boundaries, Columns, columns_of, tabulate
from .cut_search import Outcome, OutOfTime, Solution, ceiling_s, simple_bound_s
from .dominance import can_stand_in, undominated
from .downsets import TooManyDownsets, Words
from .proving import TOLERANCE, is_closed, prove
from .reduction import Dag, Floats, Ints
from .sampling import Sampler
from .segments import Segments, split, sure_nets
from .sieve import Candidates, Flags, Sieve
from .slots import Slots, Windows, windows
from .wide_segments import downsets_in_windows

_FINE = 1e-4  # bisect for a lower bound down to this part of the upper bound
_MAX_LISTED = 5_000  # list all downsets of a segment up to this many, and else only those in the windows
_MAX_SIFTED = 500_000  # look at all downsets of a segment up to this many
_MAX_CELLS = 100_000_000  # rows x states of a table


def search_large(
    dag: Dag,
    slots: Slots,
    max_downsets: int,
    check_time: Callable[[], None],
    *,
    first_only: bool = False,
    at_least_s: float = 0.0,
) -> Outcome:
    """Find the best cut, or the best known with a proven lower bound where time or downsets run out.

    The graph is taken apart at its hubs (``segments``), so that a downset is a place and a small set.  A first cut
    comes from ever closer samples; then all boundaries that a better cut can have are listed: those that the windows
    admit and the sieve leaves.  If no better chain leads through them, the cut is optimal.  ``at_least_s`` is a lower
    bound that is known already.

    O((nodes + pins) log pins) beside the listed downsets, whose pairs decide the time.
    """
    state = LargeSearch(dag, slots, max_downsets, check_time)
    state.lower_bound_s = max(state.lower_bound_s, at_least_s)
    try:
        state.sample(first_only=first_only)
        if not first_only or state.best is None:
            prove(state, _FINE)
    except OutOfTime:
        pass
    return Outcome(state.best, state.lower_bound_s, state.proven, state.n_downsets)


class LargeSearch:
    """The best solution so far, and the bound below which there is none."""

    def __init__(self, dag: Dag, slots: Slots, max_downsets: int, check_time: Callable[[], None]) -> None:
        self.dag, self.slots, self.check_time = dag, slots, check_time
        self.max_downsets = max(1, min(max_downsets, _MAX_CELLS // len(slots.used)))
        self.segments = split(dag)
        self.best: Solution | None = None
        self.lower_bound_s = simple_bound_s(dag, slots)
        self.proven = False
        self.n_downsets = 0

    @property
    def limit_s(self) -> float:
        """The load to stay below: a little less than the best known."""
        return ceiling_s(self.dag) if self.best is None else self.best.max_load_s * (1 - TOLERANCE)

    def sample(self, *, first_only: bool) -> None:
        """Lower the upper bound, unless no cut meets the constraints for reasons that the windows see."""
        inside = windows(self.dag, self.slots, self.limit_s)
        self.proven = not segments_left(self.segments, self.slots, inside, columns_of(self.dag, inside)).alive.any()
        if self.proven:
            return
        for found in Sampler(self.segments, self.slots, self.check_time).improve(self.limit_s):
            self.best = named(found.table, found.chain)
            if first_only or is_closed(self):
                return

    def exact(self, limit_s: float, most: int) -> Solution | None:
        """Find the best cut below the limit; None if there is none."""
        inside = windows(self.dag, self.slots, limit_s)
        columns = columns_of(self.dag, inside)
        left = segments_left(self.segments, self.slots, inside, columns)
        choices = self._list(left, inside, columns, most)
        if not choices:
            return None
        table = tabulate(self.segments, columns, choices)
        table, alive = boundaries_left(table, self.slots, inside)
        self.n_downsets = len(table)
        if len(table) > most:
            raise TooManyDownsets
        chain = best_row_chain(table, self.slots, alive, limit_s, self.check_time)
        return None if chain is None else named(table, chain)

    def _list(self, left: Left, inside: Windows, columns: Columns, most: int) -> list[tuple[int, Words]]:
        """List the downsets of some segments, in the windows at least; up to four times as many as may be left."""
        choices = []
        room = 4 * most
        for row in np.flatnonzero(left.alive.any(axis=1)).tolist():
            t = int(left.sieve.rows.segment[row])
            try:
                words = self.segments.downsets(t, _MAX_LISTED)
            except TooManyDownsets:
                words = self._list_wide(left, row, inside, columns, room)
            if len(words):
                choices.append((t, words))
            room -= len(words)
            if room < 0:
                raise TooManyDownsets
        return choices

    def _list_wide(self, left: Left, row: int, inside: Windows, columns: Columns, room: int) -> Words:
        """List downsets of a segment that has many: without those that others can stand in for, or in the windows."""
        t = int(left.sieve.rows.segment[row])
        narrow, net_s = left.sieve.narrow(left.alive, row, inside)
        if can_stand_in(self.segments, self.slots, t, left.alive[row]):
            try:
                words = self.segments.downsets(t, _MAX_SIFTED)
            except TooManyDownsets:
                pass
            else:
                return undominated(self.segments, columns, t, words, narrow, net_s, self.check_time)
        n_free = sum(not device.pays_transfers for device in self.slots.devices)
        return downsets_in_windows(self.segments, t, narrow, net_s, n_free, room, self.check_time)


def named(table: Boundaries, chain: RowChain) -> Solution:
    """Write a chain as stages of the caller's nodes."""
    dag = table.segments.dag
    stage_of = np.zeros(len(dag), dtype=np.int64)
    for row in chain.rows[:-1]:
        stage_of += ~table.inside(row)
    stages: list[list[object]] = [[] for _ in chain.rows]
    for s, members in zip(stage_of.tolist(), dag.members):
        stages[s].extend(members)
    n = len(stages)
    return Solution(tuple(map(tuple, stages)), chain.classes, (1,) * n, (False,) * n, chain.max_load_s)


@dataclass(frozen=True)
class Left:
    """Segments that a boundary of a chain below the limit can lie in, and the states (segments, states) of each."""

    sieve: Sieve
    alive: Flags


def segments_left(segments: Segments, slots: Slots, windows: Windows, columns: Columns) -> Left:
    """Sift the segments."""
    nets, net_s = segments.nets, segments.dag.net_s
    prefix = columns.prefix[:, : columns.n_weights]
    low, high = sure_nets(segments)
    change = np.zeros(len(segments) + 1)
    np.add.at(change, low, net_s)
    np.add.at(change, high, -net_s)
    cut_s = np.maximum(np.cumsum(change)[:-1] - 1e-12 * float(net_s.sum()), 0.0)
    inside, outside = prefix[segments.hub + 1], prefix[-1] - prefix[segments.end]
    rows, alive = meeting(windows, inside, outside, cut_s)
    first, last = np.searchsorted(rows, low), np.searchsorted(rows, high)
    size = np.maximum(last - first, 0)
    at = np.repeat(first - (np.cumsum(size) - size), size) + np.arange(int(size.sum()))
    net = np.repeat(np.arange(len(nets.size)), size)
    by_row = np.argsort(at, kind="stable")
    start = np.searchsorted(at[by_row], np.arange(len(rows) + 1))
    is_last = rows == len(segments) - 1
    only_full = is_last & (segments.end[-1] - segments.hub[-1] == 1)
    candidates = Candidates(rows, inside[rows], prefix[segments.end[rows]], start, net[by_row], is_last, only_full)
    sieve = Sieve(segments, slots, windows, candidates)
    return Left(sieve, sieve.strike(alive))


def boundaries_left(table: Boundaries, slots: Slots, windows: Windows) -> tuple[Boundaries, Flags]:
    """Drop the rows that no chain below the limit passes through, and tell the states of the others."""
    total = windows.weights.sum(axis=0)
    rows, alive = meeting(windows, table.weights, total - table.weights, table.cut_s)
    table = table.take(rows)
    full = table.is_full
    candidates = Candidates(table.segment, table.weights, table.weights, table.start, table.net, full, full)
    alive = Sieve(table.segments, slots, windows, candidates).strike(alive)
    left = np.flatnonzero(alive.any(axis=1))
    return table.take(left), alive[left]


def meeting(windows: Windows, inside: Floats, outside: Floats, cut_s: Floats) -> tuple[Ints, Flags]:
    """The rows that some state admits, and the states of each."""
    step = max(1, _MAX_CELLS // 4 // len(windows.before))
    rows, states = [np.zeros(0, dtype=np.int64)], [np.zeros((0, len(windows.before)), dtype=np.bool_)]
    for i in range(0, len(inside), step):
        met = windows.meet(inside[i : i + step], outside[i : i + step], cut_s[i : i + step])
        some = np.flatnonzero(met.any(axis=1))
        rows.append(i + some)
        states.append(met[some])
    return np.concatenate(rows), np.concatenate(states)
