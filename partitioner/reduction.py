"""A weighted DAG in arrays, and the contractions that leave its best contiguous cut unchanged."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from .burdens import Burdens

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_ROUNDING = 1e-13  # relative: sums of the same seconds in another order may differ by this


@dataclass(frozen=True)
class Dag:
    """Costs of a DAG whose nodes are numbered in a topological order; a node may stand for several contracted ones.

    ``nets`` are the transfers: a stage that holds some, but not all, of a net's nodes pays its seconds once.
    """

    members: tuple[tuple[Hashable, ...], ...]  # per node: the caller's nodes
    edges: tuple[tuple[int, int], ...]  # transitively reduced once contracted
    time_s: Floats  # (n, kinds); 0 where the node cannot run
    barred: Ints  # (n, kinds): how many members cannot run on that kind
    static_bytes: Floats  # (n,)
    stash_bytes: Floats  # (n,): saved activations of one microbatch
    working: Ints  # (n,): 1 where the node can fill a stage, 0 where it only follows its neighbours
    pins: tuple[frozenset[int], ...]  # per node: devices that its members are pinned to
    nets: tuple[tuple[int, ...], ...]
    net_s: Floats = field(default_factory=lambda: np.zeros(0))
    burdens: Burdens | None = None  # costs that do not add up; None where there are none

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def before(self) -> tuple[int, ...]:
        """Per node, the bit mask of itself and its ancestors."""
        masks = [1 << v for v in range(len(self))]
        for u, v in sorted(self.edges, key=lambda edge: edge[1]):
            masks[v] |= masks[u]
        return tuple(masks)

    @cached_property
    def after(self) -> tuple[int, ...]:
        """Per node, the bit mask of itself and its descendants."""
        masks = [1 << v for v in range(len(self))]
        for u, v in sorted(self.edges, reverse=True):
            masks[u] |= masks[v]
        return tuple(masks)

    @cached_property
    def least_s(self) -> Floats:
        """Per node, the seconds on the fastest kind that it can run on."""
        return np.where(self.barred > 0, np.inf, self.time_s).min(axis=1)  # type: ignore[no-any-return]

    @cached_property
    def incidence(self) -> csr_array:
        """1 where a net has a node."""  # (n, nets)
        nodes = [v for net in self.nets for v in net]
        columns = [t for t, net in enumerate(self.nets) for _ in net]
        return csr_array((np.ones(len(nodes)), (nodes, columns)), shape=(len(self), len(self.nets)))


def contract(dag: Dag, pairs: Iterable[tuple[int, int]] = ()) -> Dag:
    """Merge each pair of nodes, the cycles that this makes, and the nets that become equal.

    Linear in nodes, edges and nets, but for the transitive reduction: O(edges x width / 64), where the width is
    the distance, in the numbering, of nodes that are not comparable.
    """
    group = _number_groups(dag, _strong_components(dag, pairs))
    n = int(group.max(initial=-1)) + 1
    members: list[list[Hashable]] = [[] for _ in range(n)]
    pins: list[set[int]] = [set() for _ in range(n)]
    for v, g in enumerate(group):
        members[g].extend(dag.members[v])
        pins[g] |= dag.pins[v]
    nets: dict[tuple[int, ...], float] = {}
    for net, seconds in zip(dag.nets, dag.net_s):
        key = tuple(sorted({int(group[v]) for v in net}))
        if len(key) > 1 and seconds > 0:
            nets[key] = nets.get(key, 0.0) + float(seconds)
    edges = {(int(group[u]), int(group[v])) for u, v in dag.edges if group[u] != group[v]}
    return Dag(
        members=tuple(map(tuple, members)),
        edges=_transitive_reduction(n, edges),
        time_s=_sum_by(group, dag.time_s, n),
        barred=_sum_by(group, dag.barred, n).astype(np.int64),
        static_bytes=_sum_by(group, dag.static_bytes, n),
        stash_bytes=_sum_by(group, dag.stash_bytes, n),
        working=np.minimum(_sum_by(group, dag.working, n), 1).astype(np.int64),
        pins=tuple(map(frozenset, pins)),
        nets=tuple(nets),
        net_s=np.array(list(nets.values()), dtype=np.float64),
        burdens=None if dag.burdens is None else dag.burdens.contract(group, n),
    )


def _sum_by(group: Ints, values: NDArray[np.generic], n: int) -> Floats:
    total = np.zeros((n, *values.shape[1:]))
    np.add.at(total, group, values)
    return total


def _strong_components(dag: Dag, pairs: Iterable[tuple[int, int]]) -> Ints:
    arcs = [*dag.edges, *(arc for u, v in pairs for arc in ((u, v), (v, u)))]
    tails, heads = np.array(arcs, dtype=np.int64).reshape(-1, 2).T
    matrix = coo_array((np.ones(len(arcs), dtype=np.int8), (tails, heads)), shape=(len(dag), len(dag)))
    return connected_components(matrix, directed=True, connection="strong")[1]  # type: ignore[no-any-return]


def _number_groups(dag: Dag, label: Ints) -> Ints:
    """Number the groups topologically, the one with the earliest node first among those that are ready."""
    first: dict[int, int] = {}
    for v, g in enumerate(label.tolist()):
        first.setdefault(g, v)
    successors: dict[int, list[int]] = {g: [] for g in first}
    waiting = dict.fromkeys(first, 0)
    for a, b in {(int(label[u]), int(label[v])) for u, v in dag.edges}:
        if a != b:
            successors[a].append(b)
            waiting[b] += 1
    ready = [(first[g], g) for g, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    number: dict[int, int] = {}
    while ready:
        _, g = heapq.heappop(ready)
        number[g] = len(number)
        for b in successors[g]:
            waiting[b] -= 1
            if waiting[b] == 0:
                heapq.heappush(ready, (first[b], b))
    return np.array([number[g] for g in label.tolist()], dtype=np.int64)


def _transitive_reduction(n: int, edges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Keep the edges that no other path replaces.

    ``missing[v]`` holds the earlier nodes that are no ancestors of ``v``, as a bit mask from ``base[v]`` on: few and
    close in a deep graph, where the ancestors are many.
    """
    sources: list[list[int]] = [[] for _ in range(n)]
    for u, v in edges:
        sources[v].append(u)
    base, missing = [0] * n, [0] * n
    kept: list[tuple[int, int]] = []
    for v in range(n):
        low, absent = 0, (1 << v) - 1
        for i, u in enumerate(sorted(sources[v], reverse=True)):
            if i == 0:
                low = base[u] if missing[u] else u + 1
                absent = missing[u] | ((1 << v - low) - 1) ^ ((1 << u + 1 - low) - 1)
            elif u >= low and absent >> u - low & 1:
                shift = low - base[u]
                others = missing[u] >> shift if shift >= 0 else missing[u] << -shift
                absent &= others | -1 << u + 1 - low
            else:
                continue
            kept.append((u, v))
        zeros = (absent & -absent).bit_length() - 1 if absent else 0
        base[v], missing[v] = low + zeros, absent >> zeros
    return tuple(sorted(kept))


def merge_idle(dag: Dag, *, memory_limited: bool) -> Dag:
    """Merge every node that takes no time into a neighbour, where no cut can lose by it (see ``merge_cheap``)."""
    return _merge(dag, memory_limited, idle_only=True)


def merge_cheap(dag: Dag, *, memory_limited: bool) -> Dag:
    """Merge every node that takes no longer than its wire into the neighbour at the other end, where no cut can lose.

    Let ``x`` be the only predecessor (or the only successor) of a node ``v`` in the transitive reduction.  Moving
    ``v`` to the stage of ``x`` keeps every edge forward.  Nets with both nodes cost no stage more than before; a net
    with ``v`` but not ``x`` may, so these and the time of ``v`` must sum to at most the net of exactly ``{v, x}``,
    which both stages paid and no longer pay.  Where ``v`` takes time, every device must pay for transfers, and the
    stage that ``v`` leaves may be left without work.  A node with bytes moves only where no memory limit can bind, a
    node with other burdens not at all, and ``v`` must run wherever ``x`` does.
    """
    return _merge(dag, memory_limited, idle_only=False)


def _merge(dag: Dag, memory_limited: bool, idle_only: bool) -> Dag:
    while True:
        pairs = _cheap_pairs(dag, memory_limited, idle_only)
        if not pairs:
            return dag
        dag = contract(dag, pairs)


def _cheap_pairs(dag: Dag, memory_limited: bool, idle_only: bool) -> list[tuple[int, int]]:
    sources: list[list[int]] = [[] for _ in range(len(dag))]
    targets: list[list[int]] = [[] for _ in range(len(dag))]
    for u, v in dag.edges:
        sources[v].append(u)
        targets[u].append(v)
    nets_of: list[list[int]] = [[] for _ in range(len(dag))]
    for t, net in enumerate(dag.nets):
        for v in net:
            nets_of[v].append(t)
    busy = dag.time_s.any(axis=1) | (dag.working > 0)
    moved: set[int] = set()
    hosts: set[int] = set()
    pairs = []
    for v in range(len(dag)):
        if (idle_only and busy[v]) or v in hosts or (memory_limited and dag.static_bytes[v] + dag.stash_bytes[v] > 0):
            continue
        if dag.burdens is not None and dag.burdens.weighs(v):
            continue
        for x in _hosts(v, sources[v], targets[v], len(dag)):
            if x not in moved and _welcomes(dag, x, v) and _loses_nothing(dag, nets_of[v], x, v):
                pairs.append((x, v))
                moved.add(v)
                hosts.add(x)
                break
    return pairs


def _hosts(v: int, sources: Sequence[int], targets: Sequence[int], n: int) -> list[int]:
    hosts = [near[0] for near in (sources, targets) if len(near) == 1]
    if not sources and not targets:
        hosts = [x for x in range(n) if x != v][:64]  # an isolated node may go anywhere: try a few
    return hosts


def _welcomes(dag: Dag, x: int, v: int) -> bool:
    if dag.burdens is not None and not dag.burdens.keeps_inputs(v, x):
        return False
    return dag.pins[v] <= dag.pins[x] and bool(((dag.barred[v] == 0) | (dag.barred[x] > 0)).all())


def _loses_nothing(dag: Dag, nets_of_v: Sequence[int], x: int, v: int) -> bool:
    own = float(np.where(dag.barred[x] > 0, 0.0, dag.time_s[v]).max(initial=0.0))
    outside = sum(float(dag.net_s[t]) for t in nets_of_v if x not in dag.nets[t])
    between = sum(float(dag.net_s[t]) for t in nets_of_v if x in dag.nets[t] and len(dag.nets[t]) == 2)
    return own + outside <= between * (1 + _ROUNDING)
