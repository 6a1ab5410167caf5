"""The chain of downsets, out of a given family, whose differences are the best stages: a minimax dynamic programme."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .downsets import Words, bits, masks_of, weigh
from .reduction import Dag, Floats, Ints
from .slots import Slots, Step, Windows

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Chain:
    """Stages in pipeline order: the nodes of each, its device class, and the largest load of all."""

    stages: tuple[tuple[int, ...], ...]
    classes: tuple[int, ...]
    max_load_s: float


@dataclass(frozen=True)
class _Family:
    """Downsets in an order that extends inclusion, with the sums that loads are made of."""

    words: Words  # (rows, words)
    key: Ints  # (rows,): whole-number weight, larger for every larger set
    reach: int  # keys of a stage's two ends differ by at most this
    states: Flags  # (rows, states): those that the windows admit
    time_s: Floats  # (rows, kinds)
    barred: Floats  # (rows, kinds)
    bytes: Floats  # (rows, 2): static, stash
    working: Floats  # (rows,)
    net_size: Floats  # (nets,)
    net_count: Floats  # (nets, rows): nodes of the net inside
    cut_s: Floats  # (rows,)


def _family(dag: Dag, windows: Windows, words: Words) -> _Family:
    scale = 2.0**40 / (float(dag.least_s.sum()) or 1.0)
    words = words[_states(windows, words, np.zeros(len(words))).any(axis=1)]
    key = weigh(words, np.floor(dag.least_s * scale) + 1.0)
    words = words[np.argsort(key, kind="stable")]
    sizes = np.array([len(net) for net in dag.nets], dtype=np.float64)
    net_count = weigh(words, dag.incidence)
    cut_s = ((net_count > 0) & (net_count < sizes)) @ dag.net_s
    states = _states(windows, words, cut_s)
    return _Family(
        words=words,
        key=np.sort(key).astype(np.int64),
        reach=int(min(windows.limit_s * scale + len(dag) + 1, 2.0**60)),
        states=states,
        time_s=weigh(words, dag.time_s),
        barred=weigh(words, dag.barred.astype(np.float64)),
        bytes=weigh(words, np.stack([dag.static_bytes, dag.stash_bytes], axis=1)),
        working=weigh(words, dag.working.astype(np.float64)),
        net_size=sizes,
        net_count=np.ascontiguousarray(net_count.T),
        cut_s=cut_s,
    )


def _states(windows: Windows, words: Words, cut_s: Floats) -> Flags:
    weight = weigh(words, windows.weights)
    return windows.meet(weight, windows.weights.sum(axis=0) - weight, cut_s)


def best_chain(
    dag: Dag, slots: Slots, windows: Windows, words: Words, check_time: Callable[[], None] = lambda: None
) -> Chain | None:
    """Find the chain with the smallest largest load strictly below the windows' limit; None if there is none.

    The family must hold the empty and the full set.  With J inside I, the stage between them pays

        load(J, I) = t(I) - t(J) + a(I) + a(J) - sum over nets cut by both of c (1 + [no node of the net in I - J])

    where a(.) is the seconds of the nets that a downset cuts.  O(pairs of nested downsets x (nets cut + steps)).
    """
    family = _family(dag, windows, words)
    table = _Table(dag, slots, windows.limit_s, family)
    for i in range(len(family.words)):
        if i % 64 == 0:
            check_time()
        table.fill(i)
    return table.read()


class _Table:
    """``value[state, row]``: the smallest largest load of a chain that ends in that state with that downset."""

    def __init__(self, dag: Dag, slots: Slots, limit_s: float, family: _Family) -> None:
        shape = (len(slots.used), len(family.words))
        self.dag, self.slots, self.limit_s, self.family = dag, slots, limit_s, family
        self.value = np.full(shape, np.inf)
        self.parent = np.full(shape, -1, dtype=np.int64)
        self.via = np.full(shape, -1, dtype=np.int64)
        if len(family.words) and not family.words[0].any() and family.states[0, 0]:
            self.value[0, 0] = 0.0

    def fill(self, i: int) -> None:
        family = self.family
        steps = [(index, step) for index, step in enumerate(self.slots.steps) if family.states[i, step.target]]
        sources = sorted({step.source for _, step in steps})
        low = int(np.searchsorted(family.key, family.key[i] - family.reach))
        if not sources or low == i:
            return
        alive = (self.value[sources, low:i] < np.inf).any(axis=0)
        rows = low + np.flatnonzero(alive)
        nested = ~(family.words[rows] & ~family.words[i]).any(axis=1)
        if self.slots.exact:
            nested &= family.working[rows] < family.working[i]
        rows = rows[nested]
        if len(rows):
            self._relax(i, rows, steps)

    def _relax(self, i: int, rows: Ints, steps: list[tuple[int, Step]]) -> None:
        transfers_s = self._transfers_s(i, rows)
        loads: dict[tuple[int, int], Floats] = {}
        for index, step in steps:
            stage = (step.c, step.in_flight)
            if stage not in loads:
                loads[stage] = self._loads_s(i, rows, step, transfers_s)
            value = np.maximum(self.value[step.source, rows], loads[stage])
            best = int(value.argmin())
            if value[best] < min(self.limit_s, self.value[step.target, i]):
                self.value[step.target, i] = value[best]
                self.parent[step.target, i] = rows[best]
                self.via[step.target, i] = index

    def _transfers_s(self, i: int, rows: Ints) -> Floats:
        family = self.family
        inside = family.net_count[:, i]
        cut = np.flatnonzero((inside > 0) & (inside < family.net_size))
        count = family.net_count[cut[:, None], rows[None, :]]
        shared = (count > 0).astype(np.float64) + (count == inside[cut, None])
        return family.cut_s[i] + family.cut_s[rows] - self.dag.net_s[cut] @ shared  # type: ignore[no-any-return]

    def _loads_s(self, i: int, rows: Ints, step: Step, transfers_s: Floats) -> Floats:
        """The load of the stage from each row to row i; infinite where it cannot run or does not fit."""
        family, kind, device = self.family, self.slots.kind_of[step.c], self.slots.device(step.c)
        load = family.time_s[i, kind] - family.time_s[rows, kind]
        if device.pays_transfers:
            load = load + transfers_s
        possible = family.barred[rows, kind] == family.barred[i, kind]
        if device.memory_bytes is not None:
            static, stash = (family.bytes[i] - family.bytes[rows]).T
            possible &= static + step.in_flight * stash <= device.memory_bytes * (1 + 1e-12)
        return np.where(possible, load, np.inf)

    def read(self) -> Chain | None:
        family = self.family
        if not len(family.words):
            return None
        i = len(family.words) - 1
        state = min(self.slots.finals, key=lambda s: self.value[s, i])
        if not self.value[state, i] < np.inf or masks_of(family.words[i:])[0] != (1 << len(self.dag)) - 1:
            return None
        max_load_s = float(self.value[state, i])
        stages: list[tuple[int, ...]] = []
        classes: list[int] = []
        while i:
            step = self.slots.steps[self.via[state, i]]
            earlier = int(self.parent[state, i])
            inside, outside = masks_of(family.words[[i, earlier]])
            stages.append(tuple(bits(inside & ~outside)))
            classes.append(step.c)
            i, state = earlier, step.source
        return Chain(tuple(stages[::-1]), tuple(classes[::-1]), max_load_s)
