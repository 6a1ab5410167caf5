"""The chain of downsets, out of a given family, whose differences are the best stages: a minimax dynamic programme."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .downsets import Words, bits, masks_of, weigh
from .reduction import Dag, Floats, Ints
from .slots import Slots, Windows
from .stage_costs import Menu, Offer, StageCosts

Flags = NDArray[np.bool_]
_MOST_KNOWN = 1000


@dataclass(frozen=True)
class Chain:
    """Stages in pipeline order: the nodes of each, its device class, its replicas and whether it recomputes."""

    stages: tuple[tuple[int, ...], ...]
    classes: tuple[int, ...]
    replicas: tuple[int, ...]
    recompute: tuple[bool, ...]
    max_load_s: float


@dataclass(frozen=True)
class _Family:
    """Downsets in an order that extends inclusion."""

    words: Words  # (rows, words)
    key: Ints  # (rows,): whole-number weight, larger for every larger set
    reach: int  # per replica, keys of a stage's two ends differ by at most this
    states: Flags  # (rows, states): those that the windows admit
    working: Floats  # (rows,)
    costs: StageCosts


def _family(dag: Dag, slots: Slots, windows: Windows, words: Words) -> _Family:
    scale = 2.0**40 / (float(dag.least_s.sum()) or 1.0)
    weight = weigh(words, windows.weights)
    words = words[windows.admit(weight, windows.weights.sum(axis=0) - weight, np.zeros(len(words)))]
    key = weigh(words, np.floor(dag.least_s * scale) + 1.0)
    words = words[np.argsort(key, kind="stable")]
    costs = StageCosts(dag, slots, words)
    weight = weigh(words, windows.weights)
    return _Family(
        words=words,
        key=np.sort(key).astype(np.int64),
        reach=int(min(windows.limit_s * scale + len(dag) + 1, 2.0**50)),
        states=windows.meet(weight, windows.weights.sum(axis=0) - weight, costs.nets.cut_s),
        working=weigh(words, dag.working.astype(np.float64)),
        costs=costs,
    )


def best_chain(
    dag: Dag, slots: Slots, windows: Windows, words: Words, check_time: Callable[[], None] = lambda: None
) -> Chain | None:
    """Find the chain with the smallest largest load strictly below the windows' limit; None if there is none.

    The family must hold the empty and the full set.  O(pairs of downsets of consecutive states x (words + nets cut +
    steps between these states)), in vector operations, a few dozen per downset.
    """
    table = _Table(dag, slots, windows.limit_s, _family(dag, slots, windows, words))
    table.fill(check_time)
    return table.read()


@dataclass(frozen=True)
class _Arrivals:
    """The steps into some states, those into one state together."""

    menu: Menu
    targets: Ints  # (targets,)
    first: Ints  # (targets,): where the steps into the target begin
    sources: Ints  # (steps,)
    offers: Ints  # (steps,): the place of the step's offer in the menu


class _Steps:
    """The steps of the slots, by the states that they lead to."""

    def __init__(self, slots: Slots) -> None:
        steps = sorted(slots.steps, key=lambda step: step.target)
        asked = [Offer(step.c, step.replicas, step.in_flight) for step in steps]
        self.offers = sorted(set(asked), key=lambda offer: (offer.c, offer.replicas, offer.in_flight))
        place = {offer: i for i, offer in enumerate(self.offers)}
        self.offer = np.array([place[offer] for offer in asked], dtype=np.int64)
        self.source = np.array([step.source for step in steps], dtype=np.int64)
        self.target = np.array([step.target for step in steps], dtype=np.int64)
        self.menus: dict[bytes, Menu] = {}
        self.known: dict[bytes, _Arrivals | None] = {}

    def between(self, sources: Flags, targets: Flags) -> _Arrivals | None:
        """The steps from some states to others; None if there are none."""
        name = sources.tobytes() + targets.tobytes()
        if name not in self.known:
            if len(self.known) > _MOST_KNOWN:
                self.known.clear()
            self.known[name] = self._find(sources, targets)
        return self.known[name]

    def _find(self, sources: Flags, targets: Flags) -> _Arrivals | None:
        found = np.flatnonzero(sources[self.source] & targets[self.target])
        if not len(found):
            return None
        target, offer = self.target[found], self.offer[found]
        first = np.flatnonzero(np.diff(target, prepend=-1))
        is_wanted = np.zeros(len(self.offers), dtype=np.bool_)
        is_wanted[offer] = True
        name = is_wanted.tobytes()
        if name not in self.menus:
            self.menus[name] = Menu(tuple(itertools.compress(self.offers, is_wanted.tolist())))
        place = np.cumsum(is_wanted) - 1
        return _Arrivals(self.menus[name], target[first], first, self.source[found], place[offer])


class _Table:
    """``value[state, row]``: the smallest largest load of a chain that ends in that state with that downset."""

    def __init__(self, dag: Dag, slots: Slots, limit_s: float, family: _Family) -> None:
        self.dag, self.slots, self.limit_s, self.family = dag, slots, limit_s, family
        self.value = np.full((len(slots.used), len(family.words)), np.inf)
        self.steps = _Steps(slots)
        self.start = np.searchsorted(family.key, family.key - family.reach * slots.most_replicas)  # (rows,)
        if len(family.words) and not family.words[0].any():
            for state in slots.starts:
                self.value[state, 0] = 0.0 if family.states[0, state] else np.inf

    def fill(self, check_time: Callable[[], None]) -> None:
        """Take the rows in order: every stage that ends in one begins in an earlier one."""
        for row in range(1, len(self.family.words)):
            if row % 64 == 0:
                check_time()
            found = self._candidates(row)
            if found is not None:
                arrivals, _, loads = found
                best = np.minimum.reduceat(loads.min(axis=1), arrivals.first)
                self.value[arrivals.targets, row] = np.where(best < self.limit_s, best, np.inf)

    def _candidates(self, late: int) -> tuple[_Arrivals, Ints, Floats] | None:
        """The stages that can end in a row, and the largest load of each step's chain with each of them."""
        family = self.family
        start = int(self.start[late])
        finite = self.value[:, start:late] < np.inf  # (states, early)
        alive: Flags = np.any(finite, axis=1)
        arrivals = self.steps.between(alive, family.states[late])
        if arrivals is None:
            return None
        nested: Flags = np.any(finite if len(arrivals.sources) >= len(finite) else finite[arrivals.sources], axis=0)
        if self.slots.exact:
            nested &= family.working[start:late] < family.working[late]
        early = start + nested.nonzero()[0]
        early = early[~(family.words[early] & ~family.words[late]).any(axis=1)]
        if not len(early):
            return None
        loads = self.family.costs.loads_s(late, early, arrivals.menu)  # (offers, early)
        return arrivals, early, np.maximum(self.value[arrivals.sources[:, None], early], loads[arrivals.offers])

    def read(self) -> Chain | None:
        """Walk back from the full set, looking again at the stages that end in each row."""
        family = self.family
        if not len(family.words):
            return None
        row = len(family.words) - 1
        state = min(self.slots.finals, key=lambda s: self.value[s, row])
        if not self.value[state, row] < np.inf or masks_of(family.words[row:])[0] != (1 << len(self.dag)) - 1:
            return None
        max_load_s = float(self.value[state, row])
        stages: list[tuple[tuple[int, ...], int, int, bool]] = []
        while row:
            earlier, source, offer = self._best(state, row)
            inside, outside = masks_of(family.words[[row, earlier]])
            nodes = tuple(bits(inside & ~outside))
            stages.append((nodes, offer.c, offer.replicas, self.family.costs.recomputes(row, earlier, offer)))
            row, state = earlier, source
        nodes_of, classes, replicas, recompute = zip(*stages[::-1])
        return Chain(nodes_of, classes, replicas, recompute, max_load_s)

    def _best(self, state: int, row: int) -> tuple[int, int, Offer]:
        """The earlier row, its state and the way to run the stage that give a state of a row its value."""
        found = self._candidates(row)
        assert found is not None
        arrivals, early, loads = found
        at = int(np.flatnonzero(arrivals.targets == state)[0])
        end = arrivals.first[at + 1] if at + 1 < len(arrivals.first) else len(loads)
        own = loads[arrivals.first[at] : end]
        step, column = np.unravel_index(int(own.argmin()), own.shape)
        step += arrivals.first[at]
        return int(early[column]), int(arrivals.sources[step]), arrivals.menu.offers[arrivals.offers[step]]
