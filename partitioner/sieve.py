"""Tell which boundaries can be part of a chain of stages below a limit, by what the stages around them must pay."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .reduction import Floats, Ints
from .segments import Segments
from .slots import Slots, Windows, capacity_s

Flags = NDArray[np.bool_]
_MAX_WORK = 200_000_000


@dataclass(frozen=True)
class Candidates:
    """Boundaries, or sets of them that share a segment, in the order of the segments.

    The nodes before such a boundary weigh between ``low`` and ``high``; ``net`` lists the nets that it surely cuts.
    """

    segment: Ints  # (rows,)
    low: Floats  # (rows, q)
    high: Floats  # (rows, q)
    start: Ints  # (rows + 1,): where the nets of each row start
    net: Ints
    may_end: Flags  # (rows,): the full set is among these boundaries
    must_end: Flags  # (rows,): it is the only one


@dataclass(frozen=True)
class _Stage:
    """What is known of a stage between two states, whichever of their boundaries it lies between.

    ``ended`` nets have no node after its later boundary and ``begun`` ones none before its earlier boundary, so a net
    of these kinds that is cut by one boundary is cut by that one alone, and paid for; ``sure_s`` is what it pays
    beside, whatever the boundaries.
    """

    ended: Flags
    begun: Flags
    sure_s: float


@dataclass(frozen=True)
class _Side:
    """Limits on the weight before the end of a stage and after its start, per kind, and what transfers count there."""

    before: Floats
    after: Floats
    stage: _Stage | None
    factor: Floats


def _capped(values: Floats, tighter: Floats) -> Floats:
    capped = values.copy()
    capped[: len(tighter)] = np.minimum(values[: len(tighter)], tighter)
    return capped


class Sieve:
    """Strikes out pairs of boundary and state that no chain of stages below the windows' limit passes through.

    A stage from boundary J to boundary I takes w(I) - w(J) and pays at least for the nets that J cuts and I does not,
    for those that I cuts and J does not, and for long ones that it surely holds a node of, so that

        w(I) + paid(I) + sure <= max over J of (w(J) - paid(J)) + capacity

    and likewise from the end.  O(states x steps x (rows + nets cut)) per round, over the rows of a state only.
    """

    def __init__(self, segments: Segments, slots: Slots, windows: Windows, rows: Candidates) -> None:
        self.segments, self.slots, self.rows, self.limit_s = segments, slots, rows, windows.limit_s
        n_kinds = segments.dag.time_s.shape[1]
        bounds = [capacity_s(segments.dag, slots, windows.weights[:, q], windows.limit_s) for q in range(n_kinds)]
        self.capacity, self.factor = (np.stack(part, axis=1) for part in zip(*bounds))  # (classes, kinds)
        self.total = windows.weights[:, :n_kinds].sum(axis=0)
        self.slack = 1e-11 * (self.total + windows.limit_s)
        self.n_kinds = n_kinds

    def strike(self, alive: Flags, most_rounds: int = 4) -> Flags:
        """Return what is left of ``alive`` (rows, states) after some rounds, or when nothing more goes."""
        if alive.sum() * max(1, len(self.slots.steps) // len(self.slots.used)) > _MAX_WORK:
            return alive
        for _ in range(most_rounds):
            before = int(alive.sum())
            alive = self._forward(alive)
            alive = self._backward(alive)
            if not before or alive.sum() > 0.98 * before:
                break
        return alive

    def _forward(self, alive: Flags) -> Flags:
        kept = np.zeros_like(alive)
        kept[:, 0] = alive[:, 0]
        for index in self._by_level():
            step = self.slots.steps[index]
            early = np.flatnonzero(kept[:, step.source] & ~self.rows.must_end)
            late = np.flatnonzero(alive[:, step.target])
            if len(early) and len(late):
                kept[late[self._reach(step.c, early, late, forward=True)], step.target] = True
        return kept

    def _backward(self, alive: Flags) -> Flags:
        kept = np.zeros_like(alive)
        finals = list(self.slots.finals)
        kept[:, finals] = alive[:, finals] & self.rows.may_end[:, None]
        for index in reversed(self._by_level()):
            step = self.slots.steps[index]
            early = np.flatnonzero(alive[:, step.source] & ~self.rows.must_end)
            late = np.flatnonzero(kept[:, step.target])
            if len(early) and len(late):
                kept[early[self._reach(step.c, early, late, forward=False)], step.source] = True
        return kept

    def _by_level(self) -> list[int]:
        level = self.slots.used.sum(axis=1)
        return sorted(range(len(self.slots.steps)), key=lambda index: int(level[self.slots.steps[index].source]))

    def _reach(self, c: int, early: Ints, late: Ints, *, forward: bool) -> Flags:
        """Tell which of the late rows some early row may reach, or the other way round."""
        start, end, _ = self._ends(c, early, late)
        room = self.capacity[c] + self.slack
        ok: Flags = np.all(end <= start.max(axis=0) + room if forward else start >= end.min(axis=0) - room, axis=1)
        return ok

    def _ends(self, c: int, early: Ints, late: Ints) -> tuple[Floats, Floats, _Stage]:
        """What the early boundaries leave and what the late ones need, per kind: w - paid, and w + paid + sure."""
        stage = self._stage(early, late)
        factor = self.factor[c]
        start = self.rows.high[early, : self.n_kinds] - self._paid(early, stage.ended)[:, None] * factor
        end = self.rows.low[late, : self.n_kinds] + (self._paid(late, stage.begun) + stage.sure_s)[:, None] * factor
        return start, end, stage

    def narrow(self, alive: Flags, row: int, windows: Windows) -> tuple[Windows, Floats]:
        """Return windows for the boundaries of one row alone, and the seconds of the nets that count in them.

        There is a state for each pair of steps into and out of a state of the row.
        """
        counted = np.ones(len(self.segments.dag.nets), dtype=np.bool_)
        parts: list[tuple[Floats, Floats, Floats, Floats]] = []
        for state in np.flatnonzero(alive[row]).tolist():
            arriving = [self._side(index, alive) for index, step in enumerate(self.slots.steps) if step.target == state]
            leaving = [self._side(index, alive) for index, step in enumerate(self.slots.steps) if step.source == state]
            plain = _Side(np.full(self.n_kinds, np.inf), np.full(self.n_kinds, np.inf), None, np.ones(self.n_kinds))
            into = [side for side in arriving if side is not None] or [plain]
            out = [side for side in leaving if side is not None] + [plain] * bool(self.rows.may_end[row])
            for one, other in itertools.product(into, out):
                parts.append(
                    (
                        _capped(windows.before[state], one.before),
                        _capped(windows.after[state], other.after),
                        _capped(windows.before_cut[state], one.factor),
                        _capped(windows.after_cut[state], other.factor),
                    )
                )
                for stage in (one.stage, other.stage):
                    if stage is not None:
                        counted &= stage.begun if stage is one.stage else stage.ended
        before, after, before_cut, after_cut = (np.stack(part) for part in zip(*parts))
        narrowed = Windows(windows.limit_s, windows.weights, before, after, before_cut, after_cut)
        return narrowed, np.where(counted, self.segments.dag.net_s, 0.0)

    def _side(self, index: int, alive: Flags) -> _Side | None:
        """The most that can lie before the end of a step's stage, and after its start; None if no chain takes it."""
        step = self.slots.steps[index]
        early = np.flatnonzero(alive[:, step.source] & ~self.rows.must_end)
        late = np.flatnonzero(alive[:, step.target])
        if not len(early) or not len(late):
            return None
        start, end, stage = self._ends(step.c, early, late)
        room = self.capacity[step.c] + self.slack
        before = start.max(axis=0) + room - self.factor[step.c] * stage.sure_s
        after = self.total - end.min(axis=0) + room
        return _Side(before, after, stage, self.factor[step.c])

    def _stage(self, early: Ints, late: Ints) -> _Stage:
        """Look at the nodes that lie before, inside and after every stage between the two sets of rows."""
        hub, end, nets = self.segments.hub, self.segments.end, self.segments.nets
        at = self.rows.segment
        before, undecided = int(hub[at[early[0]]]), int(end[at[early[-1]]])  # J: all up to before, none from undecided
        within, after = int(hub[at[late[0]]]), int(end[at[late[-1]]])
        ended, begun = nets.last <= within, nets.first >= undecided
        crossing = np.flatnonzero(~ended & ~begun)
        crossing = crossing[(nets.first[crossing] <= before) | (nets.last[crossing] >= after)]
        held = nets.count_below(crossing, within + 1) - nets.count_below(crossing, undecided) > 0
        return _Stage(ended, begun, float(self.segments.dag.net_s[crossing[held]].sum()))

    def _paid(self, rows: Ints, which: Flags) -> Floats:
        """Per row, the seconds of the nets of some kind that it cuts."""
        start, stop = self.rows.start[rows], self.rows.start[rows + 1]
        i, j = int(start[0]), int(stop[-1])
        nets = self.rows.net[i:j]
        seconds = np.concatenate([[0.0], np.cumsum(np.where(which[nets], self.segments.dag.net_s[nets], 0.0))])
        return seconds[stop - i] - seconds[start - i]  # type: ignore[no-any-return]
