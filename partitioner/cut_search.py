"""The search for the best cut: an upper bound from samples of downsets, then the proof from all that can beat it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from .chain import Chain, best_chain
from .downsets import (
    TooManyDownsets,
    enumerate_downsets,
    inseparable,
    neighbours,
    pack,
    prefixes,
    topological_orders,
)
from .proving import FEW, TOLERANCE, is_closed, prove
from .reduction import Dag, contract
from .slots import Slots, windows

_SAMPLE = 512
_MAX_ROUNDS = 12
_FEW_PER_NODE = 4  # downsets that are listed before more samples are taken
_MOST_VALUES = 1 << 27  # a value per state and downset: a gigabyte
_FINE = 2e-3  # bisect for a lower bound down to this part of the upper bound


class OutOfTime(Exception):
    """The deadline has passed."""


@dataclass(frozen=True)
class Solution:
    """Stages in pipeline order, as the caller's nodes, with the class and number of each one's devices."""

    stages: tuple[tuple[Hashable, ...], ...]
    classes: tuple[int, ...]
    replicas: tuple[int, ...]
    recompute: tuple[bool, ...]
    max_load_s: float


@dataclass(frozen=True)
class Outcome:
    """What was found, and what is known: ``proven`` if nothing better exists (or nothing at all)."""

    solution: Solution | None
    lower_bound_s: float
    proven: bool
    n_downsets: int


def ceiling_s(dag: Dag) -> float:
    """A load that every cut stays below."""
    burdens_s = 0.0 if dag.burdens is None else dag.burdens.most_s()
    return (float(dag.time_s.max(axis=1).sum()) + float(dag.net_s.sum()) + burdens_s) * (1 + 1e-6) or 1.0


def search(dag: Dag, slots: Slots, deadline: float, max_downsets: int, at_least_s: float = 0.0) -> Outcome:
    """Find the best cut, or the best known with a proven lower bound where time or downsets run out.

    ``at_least_s`` is a lower bound that is known already.
    """
    state = _Search(dag, slots, deadline, max_downsets, at_least_s)
    try:
        state.sample()
        prove(state, _FINE)
    except OutOfTime:
        pass
    return Outcome(state.best, state.lower_bound_s, state.proven, state.n_downsets)


def any_solution(dag: Dag, slots: Slots, time_limit_s: float) -> Outcome:
    """Find a cut that meets the constraints, good or bad, or the proof that there is none, if that is soon."""
    state = _Search(dag, slots, time.monotonic() + time_limit_s, FEW)
    try:
        state.sample(first_only=True)
        if state.best is None:
            prove(state, _FINE)
    except OutOfTime:
        pass
    return Outcome(state.best, state.lower_bound_s, state.proven, state.n_downsets)


class _Search:
    """The best solution so far, and the bound below which there is none."""

    def __init__(self, dag: Dag, slots: Slots, deadline: float, max_downsets: int, at_least_s: float = 0.0) -> None:
        self.dag, self.slots, self.deadline, self.max_downsets = dag, slots, deadline, max_downsets
        self.best: Solution | None = None
        self.boundaries: list[int] = []
        self.lower_bound_s = max(simple_bound_s(dag, slots), at_least_s)
        self.proven = False
        self.tried_exact = False
        self.n_downsets = 0

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime

    @property
    def limit_s(self) -> float:
        """The load to stay below: a little less than the best known."""
        return ceiling_s(self.dag) if self.best is None else self.best.max_load_s * (1 - TOLERANCE)

    def sample(self, *, first_only: bool = False) -> None:
        """Lower the upper bound along topological orders, then around the boundaries of the best cut.

        A graph that is almost a chain has few downsets: after one order they are all looked at, which settles it.
        """
        for order in topological_orders(self.dag):
            for masks in _thin(prefixes(order)):
                self._try(masks)
                if is_closed(self):
                    return
            if (first_only and self.best is not None) or self._is_settled():
                return
        for _ in range(_MAX_ROUNDS):
            near = {far for mask in self.boundaries for at in neighbours(self.dag, mask) for far in (mask, at)}
            if not self.boundaries or not self._try(near):
                return

    def _is_settled(self) -> bool:
        """Search exactly, once, if there are few downsets to look at."""
        if self.tried_exact:
            return False
        self.tried_exact = True
        try:
            self.best = self.exact(self.limit_s, _FEW_PER_NODE * len(self.dag)) or self.best
        except TooManyDownsets:
            return False
        self.proven = True
        return True

    def _try(self, masks: Iterable[int]) -> bool:
        """Look for a better chain among some downsets."""
        self.check_time()
        words = pack(sorted({0, (1 << len(self.dag)) - 1, *masks}), len(self.dag))
        found = best_chain(self.dag, self.slots, windows(self.dag, self.slots, self.limit_s), words, self.check_time)
        if found is None:
            return False
        self.best = _named(self.dag, found)
        inside = 0
        self.boundaries = [inside := inside | sum(1 << v for v in stage) for stage in found.stages]
        return True

    def exact(self, limit_s: float, most: int) -> Solution | None:
        dag = merge_inseparable(self.dag, self.slots, limit_s)
        if not np.isfinite(dag.least_s).all():
            return None  # nodes that a cut below the limit would put together have no kind in common
        inside = windows(dag, self.slots, limit_s)
        most = min(most, max(1, _MOST_VALUES // len(self.slots.used)))
        words = enumerate_downsets(dag, inside, most, self.check_time)
        self.n_downsets = len(words)
        found = best_chain(dag, self.slots, inside, words, self.check_time)
        return None if found is None else _named(dag, found)


def _named(dag: Dag, found: Chain) -> Solution:
    names = tuple(tuple(node for v in stage for node in dag.members[v]) for stage in found.stages)
    return Solution(names, found.classes, found.replicas, found.recompute, found.max_load_s)


def _thin(masks: list[int]) -> list[list[int]]:
    """First a coarse sample of a long order, to have a limit that keeps the whole of it cheap."""
    if len(masks) <= _SAMPLE:
        return [masks]
    return [masks[:: -(-len(masks) // _SAMPLE)], masks]


def merge_inseparable(dag: Dag, slots: Slots, limit_s: float) -> Dag:
    """Contract the nodes that share a stage in every cut below the limit, until none is left."""
    n_free = sum(not device.pays_transfers for device in slots.devices)
    while True:
        smaller = contract(dag, inseparable(dag, windows(dag, slots, limit_s), n_free))
        if len(smaller) == len(dag) or not np.isfinite(smaller.least_s).all():
            return smaller
        dag = smaller


def simple_bound_s(dag: Dag, slots: Slots) -> float:
    """The largest node, and the whole weight over all devices: O(nodes x kinds x classes)."""
    bound = float(dag.least_s.max(initial=0.0)) / slots.most_replicas
    for kind in range(dag.time_s.shape[1]):
        weight = np.where(dag.barred[:, kind] > 0, dag.least_s, dag.time_s[:, kind])
        rate = 0.0
        for c, own in enumerate(slots.kind_of):
            able = (dag.barred[:, own] == 0) & (weight > 0)
            seconds = dag.time_s[able, own]
            fastest = np.divide(weight[able], seconds, out=np.full(len(seconds), np.inf), where=seconds > 0)
            rate += len(slots.classes[c]) * float(fastest.max(initial=0.0))
        if rate > 0:
            bound = max(bound, float(weight.sum()) / rate)
    return bound * (1 - 1e-12)
