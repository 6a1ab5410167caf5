"""The chain of downsets, out of a given family, whose differences are the best stages: a minimax dynamic programme."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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

    where a(.) is the seconds of the nets that a downset cuts.  O(pairs of downsets of consecutive states x (words +
    nets cut)), in vector operations of which there are as many as downsets on the smaller side.
    """
    table = _Table(dag, slots, windows.limit_s, _family(dag, windows, words))
    level = slots.used.sum(axis=1)
    for index in sorted(range(len(slots.steps)), key=lambda index: int(level[slots.steps[index].source])):
        table.take_step(index, check_time)
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

    def take_step(self, index: int, check_time: Callable[[], None]) -> None:
        """Extend every chain that ends in the step's source state by one stage."""
        step, key, reach = self.slots.steps[index], self.family.key, self.family.reach
        early = np.flatnonzero(self.value[step.source] < np.inf)
        late = np.flatnonzero(self.family.states[:, step.target])
        pairs: Iterator[tuple[Any, Any]]
        if len(early) <= len(late):
            first, last = np.searchsorted(key[late], [key[early] + 1, key[early] + reach + 1])
            pairs = ((row, late[i:j]) for row, i, j in zip(early, first, last))
        else:
            first, last = np.searchsorted(key[early], [key[late] - reach, key[late]])
            pairs = ((early[i:j], row) for row, i, j in zip(late, first, last))
        for count, (one, other) in enumerate(pairs):
            if count % 64 == 0:
                check_time()
            self._relax(index, one, other)

    def _relax(self, index: int, early: Any, late: Any) -> None:
        """Try the stages between downsets: one of ``early`` and ``late`` is a row, the other an array of rows."""
        family, step = self.family, self.slots.steps[index]
        nested = ~(family.words[early] & ~family.words[late]).any(axis=1)
        if self.slots.exact:
            nested &= family.working[early] < family.working[late]
        if not nested.any():
            return
        if np.ndim(early) == 0:
            late = late[nested]
            value = np.maximum(self.value[step.source, early], self._loads_s(early, late, step))
            better = value < np.minimum(self.value[step.target, late], self.limit_s)
            late, value = late[better], value[better]
        else:
            early = early[nested]
            values = np.maximum(self.value[step.source, early], self._loads_s(early, late, step))
            early, value = early[values.argmin()], values.min()
            if not value < min(self.value[step.target, late], self.limit_s):
                return
        self.value[step.target, late] = value
        self.parent[step.target, late] = early
        self.via[step.target, late] = index

    def _loads_s(self, early: Any, late: Any, step: Step) -> Floats:
        """The load of the stage between the downsets; infinite where it cannot run or does not fit."""
        family, kind, device = self.family, self.slots.kind_of[step.c], self.slots.device(step.c)
        load = family.time_s[late, kind] - family.time_s[early, kind]
        if device.pays_transfers:
            one, rows = (early, late) if np.ndim(early) == 0 else (late, early)
            load = load + self._transfers_s(one, rows)
        possible = family.barred[early, kind] == family.barred[late, kind]
        if device.memory_bytes is not None:
            static, stash = (family.bytes[late] - family.bytes[early]).T
            possible &= static + step.in_flight * stash <= device.memory_bytes * (1 + 1e-12)
        return np.where(possible, load, np.inf)

    def _transfers_s(self, one: int, rows: Ints) -> Floats:
        """Seconds that the stage between a downset and each of some nested ones pays."""
        family = self.family
        inside = family.net_count[:, one]
        cut = np.flatnonzero((inside > 0) & (inside < family.net_size))
        count = family.net_count[cut[:, None], rows[None, :]]
        shared = ((count > 0) & (count < family.net_size[cut, None])).astype(np.float64)
        shared += count == inside[cut, None]
        return family.cut_s[one] + family.cut_s[rows] - self.dag.net_s[cut] @ shared  # type: ignore[no-any-return]

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
