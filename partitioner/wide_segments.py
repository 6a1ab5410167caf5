"""Downsets of a segment that has too many to list them all: only those that a stage below the limit can end with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np

from .boundaries import unpack
from .downsets import TooManyDownsets, Words, enumerate_downsets, inseparable
from .reduction import Dag, Floats, Ints, contract
from .segments import Segments, iterate_crossing
from .slots import Windows

_MAX_WIDTH = 4_000  # the closures of a segment take width x width bits, several times
_MAX_ROUNDS = 3


def downsets_in_windows(
    segments: Segments,
    t: int,
    windows: Windows,
    net_s: Floats,
    n_free_devices: int,
    most: int,
    check_time: Callable[[], None],
) -> Words:
    """List the downsets of the inner nodes of a segment that some state of the windows admits.

    Everything up to the hub becomes one node and everything from the next hub on another; then the nodes that share a
    stage in every cut below the limit are contracted, which leaves the surroundings of the boundaries.  ``net_s`` are
    the seconds at which the windows count each net that a boundary cuts.

    Raises:
        TooManyDownsets: there are more than ``most``, or the segment is too wide to look at.
    """
    width = segments.width(t)
    if width > _MAX_WIDTH:
        raise TooManyDownsets
    dag, weights = _surrounded(segments, t, windows.weights, net_s)
    group = np.arange(len(dag))
    for _ in range(_MAX_ROUNDS):
        check_time()
        inside = replace(windows, weights=weights)
        smaller = contract(dag, inseparable(dag, inside, n_free_devices))
        if len(smaller) == len(dag) or not np.isfinite(smaller.least_s).all():
            break
        number = _numbers(smaller.members, len(dag))
        smaller = replace(smaller, members=tuple((v,) for v in range(len(smaller))))
        group, weights, dag = number[group], _sum_by(number, weights, len(smaller)), smaller
    words = enumerate_downsets(dag, replace(windows, weights=weights), most, check_time)
    flags = unpack(words, len(dag))
    flags = flags[(flags[:, group[0]] == 1) & (flags[:, group[-1]] == 0)][:, group[1:-1]]
    flags = flags[np.argsort(flags.sum(axis=1, dtype=np.int64), kind="stable")]
    return _pack_flags(flags)


def _surrounded(segments: Segments, t: int, weights: Floats, net_s: Floats) -> tuple[Dag, Floats]:
    """The inner nodes between one node for all before and one for all after, these two without time."""
    base, end, width = int(segments.hub[t]) + 1, int(segments.end[t]), segments.width(t)
    edges = segments.inner_edges(t) + 1
    sources, sinks = np.ones(width + 2, dtype=np.bool_), np.ones(width + 2, dtype=np.bool_)
    sources[edges[:, 1]] = sinks[edges[:, 0]] = False
    outer = [(0, v) for v in range(1, width + 1) if sources[v]] + [
        (v, width + 1) for v in range(1, width + 1) if sinks[v]
    ]
    dag = segments.dag
    _, crossing = next(iterate_crossing(segments, np.array([t])))
    nets = tuple(tuple(sorted({min(max(v - base + 1, 0), width + 1) for v in dag.nets[e]})) for e in crossing.tolist())

    def padded(values: Floats | Ints) -> Floats:
        return np.concatenate([0.0 * values[:1], values[base:end], 0.0 * values[:1]])

    return Dag(
        members=tuple((v,) for v in range(width + 2)),
        edges=tuple(sorted([(0, width + 1), *outer, *map(tuple, edges.tolist())])),
        time_s=padded(dag.time_s),
        barred=padded(dag.barred).astype(np.int64),
        static_bytes=padded(dag.static_bytes),
        stash_bytes=padded(dag.stash_bytes),
        working=padded(dag.working).astype(np.int64),
        pins=(frozenset(),) * (width + 2),
        nets=nets,
        net_s=net_s[crossing],
    ), np.concatenate([weights[:base].sum(axis=0)[None], weights[base:end], weights[end:].sum(axis=0)[None]])


def _numbers(groups: Sequence[Sequence[Hashable]], n: int) -> Ints:
    """Per node, the group that it is a member of."""
    of: dict[Hashable, int] = {v: g for g, members in enumerate(groups) for v in members}
    return np.array([of[v] for v in range(n)], dtype=np.int64)


def _sum_by(number: Ints, weights: Floats, n: int) -> Floats:
    total = np.zeros((n, weights.shape[1]))
    np.add.at(total, number, weights)
    return total


def _pack_flags(flags: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> Words:
    n_words = max(1, -(-flags.shape[1] // 64))
    padded = np.zeros((len(flags), 8 * n_words), dtype=np.uint8)
    packed = np.packbits(flags, axis=1, bitorder="little")
    padded[:, : packed.shape[1]] = packed
    return padded.view("<u8").astype(np.uint64)
