"""Partial placements, one per row, that grow node by node: loads, bytes and the devices that touch each open net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .chunk_costs import ROOM, ChunkProblem
from .reduction import Floats, Ints

MOST_OPEN = 63
_COARSE = 0.05  # the widest cell worth having, as a part of the limit
Bits = NDArray[np.uint64]


class TooManyRows(Exception):
    """More partial placements are below the limit than the caller wants to look at."""


@dataclass(frozen=True)
class Rows:
    """Partial placements of the first nodes of an order."""

    loads: Floats  # (rows, devices): seconds that are certain
    held: Floats  # (rows, devices): bytes
    touches: Bits  # (rows, devices): the open nets (by slot) that the device holds some of
    used: NDArray[np.bool_]  # (rows, devices): whether the device has a node
    chosen: NDArray[np.int8]  # (rows, nodes placed): their devices; no columns where nobody asks

    def take(self, which: NDArray[np.bool_] | Ints) -> Rows:
        return Rows(self.loads[which], self.held[which], self.touches[which], self.used[which], self.chosen[which])


@dataclass(frozen=True)
class Plan:
    """An order of the nodes, and a slot of ``Rows.touches`` for each net while some, not all, of it is placed."""

    order: tuple[int, ...]
    slots: tuple[tuple[tuple[int, float, bool], ...], ...]  # per step: slot, seconds, whether the net closes here
    work_left: Floats  # per step: the least seconds of the nodes after it


def plan_rows(problem: ChunkProblem, order: Sequence[int]) -> Plan | None:
    """Assign the slots; None if more than ``MOST_OPEN`` nets are open at once."""
    at = {v: i for i, v in enumerate(order)}
    nets = sorted((sorted(at[v] for v in net), t) for t, net in enumerate(problem.dag.nets))
    steps: list[list[tuple[int, float, bool]]] = [[] for _ in order]
    free = list(range(MOST_OPEN))[::-1]
    closing: list[tuple[int, int]] = []
    for places, t in nets:
        for end, slot in [entry for entry in closing if entry[0] < places[0]]:
            closing.remove((end, slot))
            free.append(slot)
        if not free:
            return None
        slot = free.pop()
        closing.append((places[-1], slot))
        for place in places:
            steps[place].append((slot, float(problem.dag.net_s[t]), place == places[-1]))
    work = problem.least_s[list(order)]
    return Plan(tuple(order), tuple(map(tuple, steps)), work.sum() - np.cumsum(work))


def first_row(problem: ChunkProblem, *, keep_choices: bool) -> Rows:
    """No node placed."""
    shape = (1, len(problem.devices))
    chosen = np.zeros((1, len(problem.dag) if keep_choices else 0), dtype=np.int8)
    return Rows(np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.uint64), np.zeros(shape, np.bool_), chosen)


def extend(problem: ChunkProblem, plan: Plan, step: int, rows: Rows, limit_s: float) -> Rows:
    """Place the next node on every device that keeps all loads below the limit.

    Of devices that can be swapped, an unused one is taken only if those before it are used.  The work left must fit
    below the limit at each device's best speed.
    """
    v = plan.order[step]
    parts = []
    for d in np.flatnonzero(np.isfinite(problem.seconds[v])).tolist():
        twin = max((e for e in range(d) if problem.twins[e] == problem.twins[d]), default=None)
        open_to = rows if twin is None else rows.take(rows.used[:, d] | rows.used[:, twin])
        parts.append(_placed(problem, plan, step, open_to, d, limit_s))
    if not parts:
        return rows.take(np.zeros(len(rows.loads), dtype=np.bool_))
    return Rows(*(np.concatenate(same) for same in zip(*(vars(part).values() for part in parts))))


def _placed(problem: ChunkProblem, plan: Plan, step: int, rows: Rows, d: int, limit_s: float) -> Rows:
    v = plan.order[step]
    loads, held, touches = rows.loads.copy(), rows.held.copy(), rows.touches.copy()
    used, chosen = rows.used.copy(), rows.chosen.copy()
    loads[:, d] += problem.seconds[v, d]
    held[:, d] += problem.bytes[v, d]
    used[:, d] = True
    if chosen.shape[1]:
        chosen[:, v] = d
    for slot, seconds, closes in plan.slots[step]:
        bit = np.uint64(1) << np.uint64(slot)
        holds = (touches & bit) != 0
        n_holders = holds.sum(axis=1)
        joins = ~holds[:, d] & (n_holders > 0)
        pays = joins[:, None] & holds & (n_holders == 1)[:, None]  # the only holder so far pays as well
        pays[:, d] = joins
        loads += seconds * (pays & problem.pays)
        touches[:, d] |= bit
        if closes:
            touches &= ~bit
    room = ((limit_s - loads) * speed(problem)).sum(axis=1)
    kept = (loads < limit_s).all(axis=1) & problem.fits(held) & (room >= plan.work_left[step] - ROOM * limit_s)
    return Rows(loads, held, touches, used, chosen).take(kept)


def speed(problem: ChunkProblem) -> Floats:
    """Per device, the most least-seconds that it can do in a second."""
    able = np.isfinite(problem.seconds) & (problem.least_s > 0)[:, None]
    slow = np.where(able & (problem.seconds > 0), problem.seconds, 1.0)
    return np.where(able, problem.least_s[:, None] / slow, 0.0).max(axis=0, initial=0.0)  # type: ignore[no-any-return]


def merged(problem: ChunkProblem, rows: Rows, most: int, grid_s: float, limit_s: float) -> tuple[Rows, float]:
    """Merge rows whose loads share the cells of a grid, which is coarsened until there are at most ``most``.

    Devices that can be swapped are put in order first.  A merged row has the least load and bytes of its rows on each
    device: a relaxation, so that what it excludes is excluded.  Returns the rows and the grid used.

    Raises:
        TooManyRows: even a coarse grid leaves more.
    """
    rows = _sorted_twins(problem, rows)
    marks = np.concatenate([rows.touches.view(np.int64), rows.used.astype(np.int64)], axis=1)
    while True:
        key = np.concatenate([np.floor(rows.loads / grid_s).astype(np.int64), marks], axis=1)
        order, begins = _groups(key)
        if len(begins) <= most:
            break
        if grid_s > _COARSE * limit_s:
            raise TooManyRows
        grid_s *= 4
    first = rows.take(order[begins])
    loads, held = (np.minimum.reduceat(part[order], begins, axis=0) for part in (rows.loads, rows.held))
    return Rows(loads, held, first.touches, first.used, first.chosen), grid_s


def _groups(key: Ints) -> tuple[Ints, Ints]:
    """Sort rows so that equal ones are neighbours; return the order and where each group begins.

    Sorted by a hash of the row: where two different rows have the same, a group may be split in two, no more.
    """
    factors = np.random.default_rng(0).integers(1, 2**62, key.shape[1]) * 2 + 1
    order = np.argsort((key * factors).sum(axis=1), kind="stable")
    differs = (key[order[1:]] != key[order[:-1]]).any(axis=1)
    return order, np.concatenate([[0], np.flatnonzero(differs) + 1])


def _sorted_twins(problem: ChunkProblem, rows: Rows) -> Rows:
    loads, held, touches, used = rows.loads.copy(), rows.held.copy(), rows.touches.copy(), rows.used.copy()
    for first in sorted(set(problem.twins)):
        group = [d for d, twin in enumerate(problem.twins) if twin == first]
        order = np.lexsort((held[:, group], touches[:, group], loads[:, group], ~used[:, group]), axis=1)
        for part in (loads, held, touches, used):
            part[:, group] = np.take_along_axis(part[:, group], order, 1)
    return Rows(loads, held, touches, used, rows.chosen)
