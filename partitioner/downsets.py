"""Downsets of a DAG (sets closed under predecessors): those that can end a stage below a limit, and cheap samples."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .reduction import Dag, Floats
from .slots import Windows

Words = NDArray[np.uint64]  # (rows, words): bit v of a row is node v
_CHUNK = 8192
_LARGE = 2000


class TooManyDownsets(Exception):
    """More downsets meet the windows than the caller wants to look at."""


def pack(masks: Iterable[int], n: int) -> Words:
    """Turn bit masks of ``n`` bits into rows of 64-bit words."""
    n_words = max(1, -(-n // 64))
    raw = b"".join(mask.to_bytes(8 * n_words, "little") for mask in masks)
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64).reshape(-1, n_words)


def masks_of(words: Words) -> list[int]:
    """Turn rows of words back into bit masks."""
    return [int.from_bytes(row.astype("<u8").tobytes(), "little") for row in words]


def bits(mask: int) -> Iterator[int]:
    """Yield the set bits in increasing order."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def weigh(words: Words, values: Floats | csr_array) -> Floats:
    """Sum the values of the set bits: (rows, words) x (n, ...) -> (rows, ...)."""
    total = np.empty((len(words), *values.shape[1:]))
    n = values.shape[0]
    for start in range(0, len(words), _CHUNK):
        part = np.ascontiguousarray(words[start : start + _CHUNK].astype("<u8", copy=False)).view(np.uint8)
        flags = np.unpackbits(part, axis=1, count=n, bitorder="little") if n else part[:, :0]
        total[start : start + _CHUNK] = flags.astype(np.float64) @ values
    return total


@dataclass(frozen=True)
class _Closures:
    """Per node: its ancestors, its descendants, and the nets that these or the node itself touch."""

    before: Words
    after: Words
    nets: Words
    nets_before: Words
    nets_after: Words


def _closures(dag: Dag) -> _Closures:
    touched = [0] * len(dag)
    for t, net in enumerate(dag.nets):
        for v in net:
            touched[v] |= 1 << t
    nets_before, nets_after = touched.copy(), touched.copy()
    for u, v in sorted(dag.edges, key=lambda edge: edge[1]):
        nets_before[v] |= nets_before[u]
    for u, v in sorted(dag.edges, reverse=True):
        nets_after[u] |= nets_after[v]
    of_nodes = (pack(masks, len(dag)) for masks in (dag.before, dag.after))
    return _Closures(*of_nodes, *(pack(masks, len(dag.nets)) for masks in (touched, nets_before, nets_after)))


def inseparable(dag: Dag, windows: Windows, n_free_devices: int) -> list[tuple[int, int]]:
    """Pairs of nodes that share a stage in every cut below the limit of the windows.

    An edge (u, v) is crossed by no boundary if no state meets the ancestors of u inside and the descendants of v
    outside.  A net that is cut costs at least one of its devices its seconds beside one of its nodes, unless two of
    its devices pay no transfers.
    """
    pairs = []
    if n_free_devices <= 1:
        for net, seconds in zip(dag.nets, dag.net_s):
            if seconds + dag.least_s[list(net)].min() >= windows.stage_s:
                pairs += [(net[0], v) for v in net[1:]]
    if dag.edges:
        close = _closures(dag)
        tails, heads = np.array(dag.edges).T
        inside = weigh(close.before[tails], windows.weights)
        outside = weigh(close.after[heads], windows.weights)
        cut_s = weigh(close.nets_before[tails] & close.nets_after[heads], dag.net_s)
        apart = windows.admit(inside, outside, cut_s)
        pairs += [edge for edge, possible in zip(dag.edges, apart.tolist()) if not possible]
    return pairs


@dataclass(frozen=True)
class _Rows:
    """Partial downsets: nodes decided to lie inside, nodes that thereby lie outside, and nets that touch either."""

    inside: Words
    outside: Words
    nets_in: Words
    nets_out: Words

    def parts(self) -> tuple[Words, Words, Words, Words]:
        return self.inside, self.outside, self.nets_in, self.nets_out

    def take(self, which: NDArray[np.bool_]) -> _Rows:
        return _Rows(*(part[which] for part in self.parts()))

    def join(self, other: _Rows) -> _Rows:
        return _Rows(*(np.concatenate(pair) for pair in zip(self.parts(), other.parts())))


def enumerate_downsets(dag: Dag, windows: Windows, most: int, check_time: Callable[[], None]) -> Words:
    """List every downset that some state of the windows admits.

    Nodes are decided in topological order; a partial downset is dropped as soon as no state admits any completion
    of it, and set aside once its closure decides all nodes.  Time O(rows x (nodes + nets)) for the rows met.

    Raises:
        TooManyDownsets: if more than ``most`` rows would be kept at once.
    """
    n = len(dag)
    close = _closures(dag)
    everything = pack([(1 << n) - 1], n)
    nothing, no_nets = pack([0], n), pack([0], len(dag.nets))
    rows = _Rows(nothing, nothing, no_nets, no_nets)
    done: list[Words] = []
    n_done = 0
    for v in range(n):
        check_time()
        undecided = (rows.outside[:, v // 64] >> np.uint64(v % 64)) & np.uint64(1) == 0
        children = _decide(rows.take(undecided), close, v)
        children = children.take(_admitted(dag, windows, children))
        complete = ((children.inside | children.outside) == everything).all(axis=1)
        done.append(children.inside[complete])
        n_done += int(complete.sum())
        rows = rows.take(~undecided).join(children.take(~complete))
        if n_done + len(rows.inside) > most:
            raise TooManyDownsets
    return np.concatenate([*done, rows.inside])


def _decide(rows: _Rows, close: _Closures, v: int) -> _Rows:
    """Put node v inside, or itself and its descendants outside."""
    node = pack([1 << v], 64 * rows.inside.shape[1])
    taken = _Rows(rows.inside | node, rows.outside, rows.nets_in | close.nets[v], rows.nets_out)
    left = _Rows(rows.inside, rows.outside | close.after[v], rows.nets_in, rows.nets_out | close.nets_after[v])
    return taken.join(left)


def _admitted(dag: Dag, windows: Windows, rows: _Rows) -> NDArray[np.bool_]:
    inside, outside = weigh(rows.inside, windows.weights), weigh(rows.outside, windows.weights)
    return windows.admit(inside, outside, weigh(rows.nets_in & rows.nets_out, dag.net_s))


def prefixes(order: Sequence[int]) -> list[int]:
    """The downsets, as bit masks, that a topological order passes through, with the empty and the full one.

    >>> prefixes([1, 0])
    [0, 2, 3]
    """
    return list(itertools.accumulate(order, lambda mask, v: mask | 1 << v, initial=0))


def neighbours(dag: Dag, mask: int) -> set[int]:
    """The downsets that differ from a downset by one node, each extended or shrunk to stay closed."""
    full = (1 << len(dag)) - 1
    return {mask | dag.before[v] for v in bits(full ^ mask)} | {mask & ~dag.after[v] for v in bits(mask)}


def topological_orders(dag: Dag, n_random: int = 4) -> Iterator[list[int]]:
    """Yield topological orders that differ: by number, depth first, by transfers kept low (both ways), at random."""
    n = len(dag)
    sources, targets = [0] * n, [0] * n
    for u, v in dag.edges:
        sources[v] |= 1 << u
        targets[u] |= 1 << v
    yield list(range(n))
    nets_of: list[list[int]] = [[] for _ in range(n)]
    for t, net in enumerate(dag.nets):
        for v in net:
            nets_of[v].append(t)
    if n <= _LARGE:
        yield _low_cut_order(dag, sources, targets, nets_of)
        yield _low_cut_order(dag, targets, sources, nets_of)[::-1]
    generator = random.Random(0)
    for attempt in range(n_random + 1):
        keys = [float(-v) if attempt == 0 else generator.random() for v in range(n)]
        yield _keyed_order(sources, targets, keys)


def _keyed_order(sources: Sequence[int], targets: Sequence[int], keys: Sequence[float]) -> list[int]:
    """Kahn's algorithm, the ready node with the smallest key first."""
    waiting = [mask.bit_count() for mask in sources]
    ready = [(keys[v], v) for v in range(len(keys)) if waiting[v] == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, u = heapq.heappop(ready)
        order.append(u)
        for v in bits(targets[u]):
            waiting[v] -= 1
            if waiting[v] == 0:
                heapq.heappush(ready, (keys[v], v))
    return order


def _low_cut_order(
    dag: Dag, sources: Sequence[int], targets: Sequence[int], nets_of: Sequence[Sequence[int]]
) -> list[int]:
    """Take the ready node that leaves the cheapest set of cut nets; O(n x ready nodes x nets of a node)."""
    waiting = [mask.bit_count() for mask in sources]
    ready = [v for v in range(len(sources)) if waiting[v] == 0]
    seen = [0] * len(dag.nets)
    order = []

    def rise(v: int) -> float:
        opened = sum(float(dag.net_s[t]) for t in nets_of[v] if seen[t] == 0)
        return opened - sum(float(dag.net_s[t]) for t in nets_of[v] if seen[t] == len(dag.nets[t]) - 1)

    while ready:
        u = min(ready, key=lambda v: (rise(v), v))
        ready.remove(u)
        order.append(u)
        for t in nets_of[u]:
            seen[t] += 1
        for v in bits(targets[u]):
            waiting[v] -= 1
            if waiting[v] == 0:
                ready.append(v)
    return order
