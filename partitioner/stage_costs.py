"""The load of the stage between two nested downsets, for many pairs at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .burdens import Burdens
from .downsets import Words, pack, weigh
from .reduction import Dag, Floats, Ints
from .slots import Slots

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Offer:
    """A way to run a stage, whatever its place: the class of its devices, their number, and what each holds."""

    c: int
    replicas: int
    in_flight: int


@dataclass(frozen=True)
class Menu:
    """Offers, those of one class together."""

    offers: tuple[Offer, ...]

    @cached_property
    def replicas(self) -> Ints:
        """Per offer."""  # (offers, 1)
        return np.array([[offer.replicas] for offer in self.offers], dtype=np.int64)

    @cached_property
    def in_flight(self) -> Floats:
        """Per offer."""  # (offers, 1)
        return np.array([[offer.in_flight] for offer in self.offers], dtype=np.float64)

    @cached_property
    def by_class(self) -> tuple[tuple[int, slice], ...]:
        """The classes with the place of their offers."""
        of = [offer.c for offer in self.offers]
        return tuple((c, slice(of.index(c), of.index(c) + of.count(c))) for c in dict.fromkeys(of))


@dataclass(frozen=True)
class Bytes:
    """What stages hold: once, per microbatch in flight, and per microbatch in flight if they recompute."""  # (rows,)

    once: Floats
    stash: Floats
    inputs: Floats

    def needed(self, in_flight: Floats | int, *, again: bool) -> Floats:
        """The bytes on each device, where the forward is computed again or not."""
        if again:
            return self.once + in_flight * self.inputs + self.stash
        return self.once + in_flight * self.stash


class StageCosts:
    """Costs of the stages between downsets of a family that is given by its rows of words."""

    def __init__(self, dag: Dag, slots: Slots, words: Words) -> None:
        self.slots = slots
        self.time_s = weigh(words, dag.time_s)  # (rows, kinds)
        self.barred = weigh(words, dag.barred.astype(np.float64))
        self.nets = Nets(dag, words)
        self.bytes = weigh(words, np.stack([dag.static_bytes, dag.stash_bytes], axis=1))  # (rows, 2)
        self.burdened = None if dag.burdens is None else BurdenSums(dag.burdens, words)

    def loads_s(self, late: int, early: Ints, menu: Menu) -> Floats:
        """The load on every offer of each stage from ``early`` to ``late``; infinite where it cannot run or fit."""
        shared = None if self.burdened is None else self.burdened.shared(late, early)
        held = self._bytes(late, early, shared) if self._limited else None
        paid = self.nets.seconds(late, early)
        load = np.empty((len(menu.offers), len(early)))  # (offers, early)
        for c, at in menu.by_class:
            kind, device = self.slots.kind_of[c], self.slots.device(c)
            busy = self.time_s[late, kind] - self.time_s[early, kind]
            if device.pays_transfers:
                busy = busy + paid
            load[at] = busy / menu.replicas[at]
            if device.memory_bytes is not None:
                assert held is not None
                self._limit(load[at], busy, late, early, c, held, menu.replicas[at], menu.in_flight[at])
            load[at, self.barred[early, kind] != self.barred[late, kind]] = np.inf
        if self.burdened is not None and self.burdened.burdens.all_reduce is not None:
            assert shared is not None
            reduction = self.burdened.burdens.all_reduce
            load = reduction.join(load, reduction.seconds(self.burdened.gradient(late, early, shared), menu.replicas))
        return load

    def recomputes(self, late: int, early: int, offer: Offer) -> bool:
        """Tell whether the stage between two downsets has to compute its forward again."""
        if self.burdened is None or self.burdened.burdens.recompute == "never":
            return False
        if self.burdened.burdens.recompute == "always":
            return True
        limit = self.slots.device(offer.c).memory_bytes
        if limit is None:
            return False
        rows = np.array([early])
        held = self._bytes(late, rows, self.burdened.shared(late, rows))
        return bool(held.needed(offer.in_flight, again=False)[0] > _fitting(limit))

    @cached_property
    def _limited(self) -> bool:
        return any(device.memory_bytes is not None for device in self.slots.devices)

    def _bytes(self, late: int, early: Ints, shared: Floats | None) -> Bytes:
        static, stash = (self.bytes[late] - self.bytes[early]).T
        if self.burdened is None:
            return Bytes(static, stash, stash)
        assert shared is not None
        once = static + shared[0] + self.burdened.workspace(late, early)
        return Bytes(once, stash + shared[1], self.burdened.inputs(late, early))

    def _limit(
        self, load: Floats, busy: Floats, late: int, early: Ints, c: int, held: Bytes, replicas: Ints, in_flight: Floats
    ) -> None:
        """Compute again where the stage fits only so, and make infinite what does not fit in any way."""
        limit = _fitting(self.slots.device(c).memory_bytes)
        recompute = "never" if self.burdened is None else self.burdened.burdens.recompute
        fits = held.needed(in_flight, again=recompute == "always") <= limit
        if recompute == "choose":
            assert self.burdened is not None
            kind = self.slots.kind_of[c]
            again_s = busy + self.burdened.forward_s[late, kind] - self.burdened.forward_s[early, kind]
            np.copyto(load, again_s / replicas, where=~fits)
            fits |= held.needed(in_flight, again=True) <= limit
        load[~fits] = np.inf


def _fitting(limit: float | None) -> float:
    return np.inf if limit is None else limit * (1 + 1e-12)


class Nets:
    """The seconds of the transfers that a stage pays.

    With J inside I, and a(.) the seconds of the nets that a downset cuts, the stage between them pays

        a(I) + a(J) - sum over nets cut by both of c (1 + [no node of the net in I - J])
    """

    def __init__(self, dag: Dag, words: Words) -> None:
        self.net_s = dag.net_s
        self.size = np.array([len(net) for net in dag.nets], dtype=np.float64)
        count = weigh(words, dag.incidence)
        self.cut_s = ((count > 0) & (count < self.size)) @ dag.net_s
        self.count = np.ascontiguousarray(count.T)  # (nets, rows): nodes of the net inside

    def seconds(self, late: int, early: Ints) -> Floats:
        """Per stage from ``early`` to ``late``; O(early x nets cut by late)."""
        inside = self.count[:, late]
        cut = np.flatnonzero((inside > 0) & (inside < self.size))
        count = self.count[cut[:, None], early[None, :]]
        twice = (count > 0).astype(np.float64) + (count == inside[cut, None])
        return self.cut_s[late] + self.cut_s[early] - self.net_s[cut] @ twice  # type: ignore[no-any-return]


class BurdenSums:
    """Of stages between downsets, the costs that are no differences of the downsets' own."""

    def __init__(self, burdens: Burdens, words: Words) -> None:
        self.burdens = burdens
        n = len(burdens.gradient_bytes)
        self.forward_s = weigh(words, burdens.forward_s)  # (rows, kinds)
        self.gradient_bytes = weigh(words, burdens.gradient_bytes)  # (rows,)
        self.group_size = np.array([len(nodes) for nodes in burdens.groups], dtype=np.float64)
        group_count = weigh(words, _incidence(burdens.groups, n))
        self.whole = (group_count == self.group_size) @ burdens.group_bytes  # (rows, 3)
        self.group_count = np.ascontiguousarray(group_count.T)  # (groups, rows)
        self.n_users = np.array([len(users) for _, users in burdens.inputs], dtype=np.float64)
        makes = weigh(words, _incidence([(producer,) for producer, _ in burdens.inputs], n))
        takes = weigh(words, _incidence([users for _, users in burdens.inputs], n))
        self.open_bytes = (makes * (takes < self.n_users)) @ burdens.input_bytes  # (rows,)
        self.makes, self.takes = np.ascontiguousarray(makes.T), np.ascontiguousarray(takes.T)  # (inputs, rows)
        by_size = np.argsort(-burdens.workspace_bytes, kind="stable")
        by_size = by_size[burdens.workspace_bytes[by_size] > 0]
        self.workspaces = burdens.workspace_bytes[by_size]
        self.workers = _reorder(words, by_size)

    def shared(self, late: int, early: Ints) -> Floats:
        """Static, stash and gradient bytes of the groups that each stage has a node of."""  # (3, early)
        inside = self.group_count[:, late]
        cut = np.flatnonzero((inside > 0) & (inside < self.group_size))
        some = self.group_count[cut[:, None], early[None, :]] < inside[cut, None]
        held: Floats = (self.whole[late] - self.whole[early]).T + self.burdens.group_bytes[cut].T @ some
        return held

    def gradient(self, late: int, early: Ints, shared: Floats) -> Floats:
        """The gradient bytes that replicas of each stage add up."""
        return self.gradient_bytes[late] - self.gradient_bytes[early] + shared[2]  # type: ignore[no-any-return]

    def inputs(self, late: int, early: Ints) -> Floats:
        """The bytes that each stage receives.

        Where ``late`` has a net whole, the stage receives it if ``early`` has the producer and not all consumers
        (``open_bytes``); nets that ``late`` cuts are looked at one by one.
        """
        makes, takes = self.makes[:, late], self.takes[:, late]
        cut = np.flatnonzero((makes + takes > 0) & (makes + takes < 1 + self.n_users))
        before = self.makes[cut[:, None], early[None, :]]
        taken = self.takes[cut[:, None], early[None, :]]
        received = (taken < takes[cut, None]) * (1 - makes[cut, None] + before)
        received -= before * (taken < self.n_users[cut, None])
        return self.open_bytes[early] + self.burdens.input_bytes[cut] @ received

    def workspace(self, late: int, early: Ints) -> Floats:
        """The largest workspace in each stage: its first node in decreasing order of size."""
        if not len(self.workspaces):
            return np.zeros(len(early))
        new = self.workers[late] & ~self.workers[early]  # (early, words)
        word = (new != 0).argmax(axis=1)
        bits = new[np.arange(len(early)), word]
        lowest = np.frexp((bits & (~bits + np.uint64(1))).astype(np.float64))[1] - 1
        at = np.minimum(64 * word + np.maximum(lowest, 0), len(self.workspaces) - 1)
        return np.where(bits == 0, 0.0, self.workspaces[at])


def _incidence(groups: Sequence[tuple[int, ...]], n: int) -> csr_array:
    nodes = [v for group in groups for v in group]
    columns = [g for g, group in enumerate(groups) for _ in group]
    return csr_array((np.ones(len(nodes)), (nodes, columns)), shape=(n, len(groups)))


def _reorder(words: Words, nodes: Any) -> Words:
    """Rows of words with bit ``i`` for the ``i``-th of ``nodes``."""
    chosen = np.zeros((len(words), 64 * max(1, -(-len(nodes) // 64))), dtype=np.uint8)
    for i, v in enumerate(nodes.tolist()):
        chosen[:, i] = words[:, v // 64] >> np.uint64(v % 64) & np.uint64(1)
    return np.packbits(chosen, axis=1, bitorder="little").view("<u8").astype(np.uint64)


def bytes_of(dag: Dag, nodes: Sequence[int], in_flight: int, *, again: bool) -> float:
    """The bytes that a stage of these nodes needs on each of its devices."""
    words = pack([0, sum(1 << v for v in nodes)], len(dag))
    static, stash = weigh(words, np.stack([dag.static_bytes, dag.stash_bytes], axis=1))[1]
    held = Bytes(static, stash, stash)
    if dag.burdens is not None:
        burdened, nothing = BurdenSums(dag.burdens, words), np.array([0])
        shared, inputs = burdened.shared(1, nothing), burdened.inputs(1, nothing)
        held = Bytes(static + shared[0] + burdened.workspace(1, nothing), stash + shared[1], inputs)
    return float(np.max(held.needed(in_flight, again=again)))
