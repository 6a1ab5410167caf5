"""The exact cut with several chunks per device, by listing every placement of a small graph that can be better."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .chunk_costs import ChunkProblem, Placement, Scorer
from .chunk_rows import Bits, TooManyRows, extend, first_row, plan_rows
from .downsets import bits
from .reduction import Dag, Ints

MOST_NODES = 63
MOST_ROWS = 600_000
_PART = 8192


def best_below(
    problem: ChunkProblem, limit_s: float, most_rows: int, check_time: Callable[[], None] = lambda: None
) -> Placement | None:
    """Find the best placement with every load below the limit; None if there is none.

    Nodes are placed in topological order, breadth first, so that the nodes placed are a downset at every step: a row
    whose nodes do not fall into ``max_chunks`` chunks per device is dropped at once.  O(devices ** nodes) rows.

    Raises:
        TooManyRows: more than ``most_rows`` rows are left at a step, or there are too many nodes or open nets for
            the bit masks.
    """
    plan = plan_rows(problem, range(len(problem.dag))) if len(problem.dag) <= MOST_NODES else None
    if plan is None:
        raise TooManyRows
    rows = first_row(problem, keep_choices=True)
    for step in range(len(problem.dag)):
        check_time()
        rows = extend(problem, plan, step, rows, limit_s)
        rows = rows.take(chunkable(problem, rows.chosen[:, : step + 1], check_time))
        if len(rows.loads) > most_rows:
            raise TooManyRows
    if not len(rows.loads):
        return None
    best = int(rows.loads.max(axis=1).argmin())
    return arrange(problem, rows.chosen[best].astype(np.int64))


def chunkable(
    problem: ChunkProblem, chosen: NDArray[np.int8], check_time: Callable[[], None] = lambda: None
) -> NDArray[np.bool_]:
    """Tell which rows of devices, for the first nodes of the graph, fall into ``max_chunks`` chunks per device.

    A chunk that starts may as well take every node of its device that it can, as a larger downset leaves no less to
    choose from.  So it is enough to search over sequences of devices, breadth first and for many rows at once.

    Raises:
        TooManyRows: more than ``MOST_ROWS`` sequences are open at once.
    """
    runs = np.stack([_runs(chosen, d) for d in range(len(problem.devices))], axis=1)
    result: NDArray[np.bool_] = np.all(runs <= problem.max_chunks, axis=1)
    doubtful = np.flatnonzero(~result)
    for start in range(0, len(doubtful), _PART):
        check_time()
        part = doubtful[start : start + _PART]
        result[part] = _search(problem, chosen[part])
    return result


def _runs(chosen: NDArray[np.int8], d: int) -> Ints:
    """Count the chunks of a device if the chunks follow the order of the columns."""
    here = chosen == d
    return here[:, 0].astype(np.int64) + (here[:, 1:] & ~here[:, :-1]).sum(axis=1)  # type: ignore[no-any-return]


def _search(problem: ChunkProblem, chosen: NDArray[np.int8]) -> NDArray[np.bool_]:
    n, k = chosen.shape[1], len(problem.devices)
    before = np.array(problem.dag.before[:n], dtype=np.uint64)
    bit = np.uint64(1) << np.arange(n, dtype=np.uint64)
    own = np.stack([((chosen == d) * bit).sum(axis=1, dtype=np.uint64) for d in range(k)], axis=1)
    everything = np.uint64((1 << n) - 1)
    found = np.zeros(len(chosen), dtype=np.bool_)
    row, inside = np.arange(len(chosen)), np.zeros(len(chosen), dtype=np.uint64)
    left = np.full((len(chosen), k), problem.max_chunks, dtype=np.int8)
    while len(row):
        parts = []
        for d in range(k):
            may = np.flatnonzero(left[:, d] > 0)
            grown = _closed(inside[may], own[row[may], d], before, bit)
            may, grown = may[grown != inside[may]], grown[grown != inside[may]]
            rest = left[may]
            rest[:, d] -= 1
            parts.append((row[may], grown, rest))
        row, inside, left = (np.concatenate(same) for same in zip(*parts))
        if len(row) > MOST_ROWS:
            raise TooManyRows
        found[row[inside == everything]] = True
        states = np.unique(np.column_stack([row, inside.view(np.int64), left])[~found[row]], axis=0)
        row, inside, left = states[:, 0], states[:, 1].copy().view(np.uint64), states[:, 2:].astype(np.int8)
    return found


def _closed(inside: Bits, own: Bits, before: Bits, bit: Bits) -> Bits:
    """Add to downsets every node that has all its ancestors inside or among the device's own nodes."""
    reach = inside | own
    grown = inside.copy()
    for mask, one in zip(before, bit):
        grown |= np.where(mask & ~reach == 0, one, np.uint64(0))
    return grown


def arrange(problem: ChunkProblem, device_of: Ints) -> Placement | None:
    """Order the chunks of a placement, depth first; None if some device needs more than ``max_chunks``."""
    n_devices = len(problem.devices)
    own = [sum(1 << v for v in np.flatnonzero(device_of == d).tolist()) for d in range(n_devices)]
    everything = (1 << len(problem.dag)) - 1
    seen: set[tuple[int, tuple[int, ...]]] = set()
    stack: list[tuple[int, tuple[tuple[int, int], ...]]] = [(0, ())]
    while stack:
        inside, steps = stack.pop()
        if inside == everything:
            return _placement(problem, device_of, steps)
        counts = [sum(d == e for e, _ in steps) for d in range(n_devices)]
        for d, mask in enumerate(own):
            grown = _reached(problem.dag, inside, mask)
            state = (grown, (*counts[:d], counts[d] + 1, *counts[d + 1 :]))
            if counts[d] < problem.max_chunks and grown != inside and state not in seen:
                seen.add(state)
                stack.append((grown, (*steps, (d, grown))))
    return None


def _reached(dag: Dag, inside: int, own: int) -> int:
    reach = inside | own
    return inside | sum(1 << v for v in bits(own & ~inside) if not dag.before[v] & ~reach)


def _placement(problem: ChunkProblem, device_of: Ints, steps: tuple[tuple[int, int], ...]) -> Placement:
    position = np.zeros(len(problem.dag), dtype=np.int64)
    earlier = 0
    for place, (_, inside) in enumerate(steps):
        position[list(bits(inside & ~earlier))] = place
        earlier = inside
    max_load_s = float(Scorer(problem).loads(device_of[None]).max())
    return Placement(position, np.array([d for d, _ in steps], dtype=np.int64), max_load_s)
