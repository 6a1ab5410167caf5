"""Good cuts of a large graph, fast: chains through a sample of boundaries, thinned less and less around the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .block_chain import RowChain, best_row_chain
from .boundaries import Boundaries, columns_of, tabulate, unpack
from .downsets import TooManyDownsets, masks_of, pack
from .reduction import Floats, Ints
from .segments import Segments
from .slots import Slots, windows

_BINS = (96, 512, 2048, 8192)  # places of the first samples; more than 512 only where no cut is found
_NEAR = 48  # places around each boundary
_ZOOM = 8.0
_MAX_ROUNDS = 4  # at the same distance
_MAX_INSIDE = 5_000  # list the downsets of a segment up to this many
_MAX_AROUND = 600  # downsets listed around a boundary

Place = tuple[int, int]  # a segment, and the bit mask of its inner nodes that are inside


@dataclass(frozen=True)
class Pool:
    """The prefixes of a topological order, as places to cut, with the weight and the transfers of each."""

    order: Ints  # (n,): nodes by position
    weight_s: Floats  # (n + 1,): least seconds of the nodes inside
    cut_s: Floats  # (n + 1,)


@dataclass(frozen=True)
class Sample:
    """A chain, with the table that it was found in."""

    table: Boundaries
    chain: RowChain


def pool_of(segments: Segments, order: Ints) -> Pool:
    """Sum up along a topological order: O(nodes + pins)."""
    dag, nets = segments.dag, segments.nets
    position = np.empty(len(dag), dtype=np.int64)
    position[order] = np.arange(len(dag))
    change = np.zeros(len(dag) + 1)
    if len(dag.nets):
        at = position[nets.pins]
        np.add.at(change, np.minimum.reduceat(at, nets.start[:-1]) + 1, dag.net_s)
        np.add.at(change, np.maximum.reduceat(at, nets.start[:-1]) + 1, -dag.net_s)
    weight_s = np.concatenate([[0.0], np.cumsum(dag.least_s[order])])
    return Pool(order, weight_s, np.cumsum(change))


def thin(pool: Pool, low_s: float, high_s: float, most: int) -> Ints:
    """Choose prefixes with a weight between two: from each of ``most`` equal ranges, the one that cuts least."""
    i, j = np.searchsorted(pool.weight_s, [low_s, high_s], side="left")
    positions = np.arange(i, j + 1 if j < len(pool.weight_s) else j)
    if len(positions) <= most:
        return positions
    ranges = ((pool.weight_s[positions] - low_s) * (most / max(high_s - low_s, 1e-300))).astype(np.int64)
    order = np.lexsort((pool.cut_s[positions], ranges))
    first = np.flatnonzero(np.diff(ranges[order], prepend=-1))
    return positions[order[first]]


class Sampler:
    """Looks for better and better chains, first among few places all over the graph, then close to the best chain."""

    def __init__(self, segments: Segments, slots: Slots, check_time: Callable[[], None]) -> None:
        self.segments, self.slots, self.check_time = segments, slots, check_time
        self.pools = [pool_of(segments, order) for order in _orders(segments)]
        self.total_s = float(self.pools[0].weight_s[-1])

    def improve(self, limit_s: float) -> Iterator[Sample]:
        """Yield chains below the limit, each better than the one before."""
        best: Sample | None = None
        for most in _BINS:
            places = {place for pool in self.pools for place in self._places(pool, thin(pool, 0.0, self.total_s, most))}
            limit_s = limit_s if best is None else best.chain.max_load_s
            better = self.try_places(places, limit_s, at_once=most == _BINS[0])
            if better is not None:
                yield (best := better)
            if most > len(self.segments.dag) or (best is not None and most >= _BINS[1]):
                break
        if best is None:
            return
        radius_s, done = 2.0 * self.total_s / _BINS[1], False
        while not done:
            done = True
            for _ in range(_MAX_ROUNDS):
                places, complete = self._near(best, radius_s)
                done &= complete
                better = self.try_places(places, best.chain.max_load_s)
                if better is None:
                    break
                yield (best := better)
            radius_s /= _ZOOM
        for _ in range(_MAX_ROUNDS):
            better = self.try_places(self._inside(best), best.chain.max_load_s)
            if better is None:
                return
            yield (best := better)

    def try_places(self, places: set[Place], limit_s: float, *, at_once: bool = False) -> Sample | None:
        """Find the best chain below the limit through some places; ``at_once``: whatever the time."""
        check_time = _no_check if at_once else self.check_time
        check_time()
        last = len(self.segments) - 1
        per_segment: dict[int, set[int]] = {0: {0}}
        for t, mask in [*places, (last, (1 << self.segments.width(last)) - 1)]:
            per_segment.setdefault(t, set()).add(mask)
        choices = [
            (t, pack(sorted(masks, key=int.bit_count), self.segments.width(t)))
            for t, masks in sorted(per_segment.items())
        ]
        inside = windows(self.segments.dag, self.slots, limit_s)
        table = tabulate(self.segments, columns_of(self.segments.dag, inside), choices)
        alive = inside.meet(table.weights, inside.weights.sum(axis=0) - table.weights, table.cut_s)
        chain = best_row_chain(table, self.slots, alive, limit_s, check_time)
        return None if chain is None else Sample(table, chain)

    def _places(self, pool: Pool, positions: Ints) -> Iterator[Place]:
        segments = self.segments.segment_of_prefix(positions)
        for t, position in zip(segments.tolist(), positions.tolist()):
            base = int(self.segments.hub[t]) + 1
            inside = np.zeros(self.segments.width(t), dtype=np.uint8)
            inside[pool.order[base:position] - base] = 1
            yield t, int.from_bytes(np.packbits(inside, bitorder="little").tobytes(), "little")

    def _boundaries(self, best: Sample) -> Iterator[tuple[Place, float]]:
        for row in best.chain.rows[:-1]:
            mask = masks_of(best.table.local[row : row + 1])[0]
            yield (int(best.table.segment[row]), mask), float(best.table.least_s[row])

    def _near(self, best: Sample, radius_s: float) -> tuple[set[Place], bool]:
        """Choose places up to a distance from the boundaries, and tell whether these are all prefixes there."""
        places: set[Place] = set()
        complete = True
        for place, weight_s in self._boundaries(best):
            places.add(place)
            for pool in self.pools:
                near = thin(pool, weight_s - radius_s, weight_s + radius_s, _NEAR)
                complete &= len(near) == near[-1] - near[0] + 1 if len(near) else True
                places.update(self._places(pool, near))
        return places, complete

    def _inside(self, best: Sample) -> set[Place]:
        """List downsets of the segments around each boundary, or those that differ by a node where these are many."""
        places: set[Place] = set()
        for (at, mask), _ in self._boundaries(best):
            places.update((at, other) for other in _one_node_apart(self.segments, at, mask))
            room = _MAX_AROUND
            for t in sorted(range(max(0, at - _NEAR), min(at + _NEAR, len(self.segments))), key=lambda t: abs(t - at)):
                try:
                    masks = masks_of(self.segments.downsets(t, _MAX_INSIDE))
                except TooManyDownsets:
                    continue
                room -= len(masks)
                if room < 0:
                    break
                places.update((t, other) for other in masks)
        return places


def _no_check() -> None:
    """Take the time that it takes."""


def _one_node_apart(segments: Segments, t: int, mask: int) -> Iterator[int]:
    width = segments.width(t)
    edges = segments.inner_edges(t)
    inside = unpack(pack([mask], width), width)[0].astype(np.bool_)
    tails, heads = edges.T
    blocked = np.zeros(width, dtype=np.bool_)
    blocked[heads[~inside[tails]]] = True
    blocked[tails[inside[heads]]] = True
    for v in np.flatnonzero(~blocked).tolist():
        yield mask ^ 1 << v


def _orders(segments: Segments) -> list[Ints]:
    """The numbering, and where a segment is wide an order that lets its branches take turns."""
    orders = [np.arange(len(segments.dag))]
    if max(map(segments.width, range(len(segments)))) > _NEAR:
        orders.append(_level_order(segments))
    return orders


def _level_order(segments: Segments) -> Ints:
    """Sort each segment by the mean weight before and after its nodes along the heaviest paths."""
    dag = segments.dag
    before, after = np.zeros(len(dag)), np.zeros(len(dag))
    edges = list(zip(segments.tails.tolist(), segments.heads.tolist()))
    least = dag.least_s.tolist()
    for u, v in sorted(edges, key=lambda edge: edge[1]):
        before[v] = max(before[v], before[u] + least[u])
    for u, v in reversed(edges):
        after[u] = max(after[u], after[v] + least[v])
    segment = segments.segment_of_prefix(np.arange(1, len(dag) + 1))
    return np.lexsort((np.arange(len(dag)), before - after, segment))
