"""A DAG cut at its hubs, the nodes that are comparable with all others, into segments whose downsets are local."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .downsets import TooManyDownsets, Words, pack
from .reduction import Dag, Ints


@dataclass(frozen=True)
class Nets:
    """The transfers in arrays: the nodes of net ``t`` are ``pins[start[t] : start[t + 1]]``, in increasing order."""

    start: Ints  # (nets + 1,)
    pins: Ints
    net_of: Ints  # per pin
    by_node: Ints  # the pins' numbers, sorted by node
    node_start: Ints  # (n + 1,): where each node's pins start in by_node

    @cached_property
    def size(self) -> Ints:
        """The number of nodes of each net."""
        return np.diff(self.start)

    @cached_property
    def first(self) -> Ints:
        """The first node of each net."""
        return self.pins[self.start[:-1]]

    @cached_property
    def last(self) -> Ints:
        """The last node of each net."""
        return self.pins[self.start[1:] - 1]

    @cached_property
    def _keys(self) -> Ints:
        return self.net_of * (len(self.node_start) + 1) + self.pins

    def count_below(self, nets: Ints, node: int | Ints) -> Ints:
        """How many nodes of each net have a number below ``node``."""
        found = np.searchsorted(self._keys, nets * (len(self.node_start) + 1) + node)
        return (found - self.start[nets]).astype(np.int64)


def read_nets(dag: Dag) -> Nets:
    """Put the nets of a contracted graph into arrays: O(pins log pins)."""
    size = np.array([len(net) for net in dag.nets], dtype=np.int64)
    start = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
    pins = np.fromiter((v for net in dag.nets for v in net), dtype=np.int64, count=int(start[-1]))
    by_node = np.argsort(pins, kind="stable")
    node_start = np.searchsorted(pins[by_node], np.arange(len(dag) + 1))
    return Nets(start, pins, np.repeat(np.arange(len(size)), size), by_node, node_start)


@dataclass(frozen=True)
class Segments:
    """Segment ``t`` holds the nodes between its hub and the next; before the first hub there is a segment as well.

    Every downset consists of all nodes up to some hub and a downset of the nodes inside that hub's segment, in one way.
    """

    dag: Dag
    hub: Ints  # per segment: its hub, -1 for the first
    end: Ints  # per segment: the next hub, or n
    tails: Ints  # of all edges, sorted
    heads: Ints
    cache: dict[tuple[int, int, bytes], Words | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hub)

    @cached_property
    def nets(self) -> Nets:
        """The transfers in arrays."""
        return read_nets(self.dag)

    def width(self, t: int) -> int:
        """The number of nodes inside a segment."""
        return int(self.end[t] - self.hub[t] - 1)

    def segment_of_prefix(self, length: int | Ints) -> Ints:
        """The segment of the downset of the first ``length`` nodes."""
        return np.searchsorted(self.hub, np.asarray(length), side="left") - 1

    def inner_edges(self, t: int) -> Ints:
        """The edges inside a segment, its nodes numbered from 0."""  # (edges, 2)
        i, j = np.searchsorted(self.tails, [self.hub[t] + 1, self.end[t]])
        inside = self.heads[i:j] < self.end[t]
        both: Ints = np.stack([self.tails[i:j][inside], self.heads[i:j][inside]], axis=1)
        return both - int(self.hub[t] + 1)

    def downsets(self, t: int, most: int) -> Words:
        """List the downsets inside a segment; equal segments share the work.

        Raises:
            TooManyDownsets: there are more than ``most``.
        """
        edges = self.inner_edges(t)
        key = (self.width(t), most, edges.tobytes())
        if key not in self.cache:
            self.cache[key] = _all_downsets(self.width(t), edges, most)
        found = self.cache[key]
        if found is None:
            raise TooManyDownsets
        return found


def _all_downsets(n: int, edges: Ints, most: int) -> Words | None:
    sources = [0] * n
    for u, v in edges.tolist():
        sources[v] |= 1 << u
    masks = [0]
    for v in range(n):
        masks += [mask | 1 << v for mask in masks if mask & sources[v] == sources[v]]
        if len(masks) > most:
            return None
    return pack(sorted(masks, key=int.bit_count), n)


def split(dag: Dag) -> Segments:
    """Find the hubs of a graph whose nodes are numbered topologically: O(nodes + edges).

    A node is one if every earlier node has a successor up to it, and every later node a predecessor from it on; then
    paths lead from all earlier nodes to it, and from it to all later ones.
    """
    n = len(dag)
    edges = np.array(sorted(dag.edges), dtype=np.int64).reshape(-1, 2)
    tails, heads = edges.T
    first_successor, last_source = np.full(n, n), np.full(n, -1)
    np.minimum.at(first_successor, tails, heads)
    np.maximum.at(last_source, heads, tails)
    reached = np.concatenate([[-1], np.maximum.accumulate(first_successor)[:-1]])
    reaches = np.concatenate([np.minimum.accumulate(last_source[::-1])[::-1][1:], [n]])
    position = np.arange(n)
    hub = np.concatenate([[-1], position[(reached <= position) & (reaches >= position)]])
    return Segments(dag, hub, np.concatenate([hub[1:], [n]]), tails, heads)


def sure_nets(segments: Segments) -> tuple[Ints, Ints]:
    """Per net, the range of the segments whose every downset cuts it: from the first, up to the second (excluded)."""
    nets = segments.nets
    low = np.searchsorted(segments.hub, nets.first)
    high = np.searchsorted(segments.end, nets.last, side="right")
    return low, np.maximum(low, high)


def iterate_crossing(segments: Segments, chosen: Ints) -> Iterator[tuple[int, Ints]]:
    """Yield each of some segments, in increasing order, with the nets that one of its downsets may cut.

    The time is linear in the nets and in the nets yielded.
    """
    nets = segments.nets
    order = np.argsort(nets.first, kind="stable")
    starts = nets.first[order]
    taken = 0
    active = np.zeros(0, dtype=np.int64)
    for t in chosen.tolist():
        upto = int(np.searchsorted(starts, segments.end[t]))
        active = np.concatenate([active, order[taken:upto]])
        taken = upto
        active = active[nets.last[active] > segments.hub[t]]
        yield t, active
