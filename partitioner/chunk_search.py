"""Annealing of chunks: which chunk each node is in and which device each chunk is on, in many chains at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from .chunk_costs import ChunkProblem, Placement, Scorer, compact
from .downsets import pack, topological_orders
from .reduction import Floats, Ints

_MOST_ORDERS = 6
_MOST_CLOSED = 4000  # nodes up to which moves with all descendants are made: the matrix has as many rows and columns
_COLD = 1e-4  # last temperature, as a part of the load
_CLOCK_EVERY, _SHUFFLE_EVERY, _RESAMPLE_EVERY = 16, 100, 400
_AGAIN = 0.5  # chance of one more move before the loads are looked at
_SLICE = 0.3  # of the geometric distribution of the nodes sliced off a chunk's end


@dataclass(frozen=True)
class Schedule:
    """How long to anneal: ``n_rounds`` times from hot (a part of the load; a quarter after the first) to cold.

    ``power`` is that of the norm of the loads that stands for their maximum, so that the second largest counts as well.
    """

    n_steps: int
    n_chains: int = 24
    n_rounds: int = 4
    hot: float = 0.02
    power: float = 96.0


def anneal(
    problem: ChunkProblem, start: Placement, schedule: Schedule, deadline: float, target_s: float, seed: int = 0
) -> Placement:
    """Improve a placement by simulated annealing, until some load is at most ``target_s`` or the schedule ends.

    A state has ``problem.n_chunks`` positions in order, each with a device, some of them empty; an edge never goes
    back.  A move takes a set that is closed under successors (the descendants of a node, or the end of a chunk in a
    topological order) to a position at least so late, or one closed under predecessors to one at most so early, or
    swaps the devices of two positions.  All chains make the same sort of move at a time, so that one step is a few
    dozen array operations.  Empty positions are shuffled at no cost, and bad chains are replaced by good ones.

    The result depends on the seed alone unless ``deadline`` (of ``time.monotonic``) comes before the last step: then
    the cooling is hastened.  O(steps x chains x (nodes + net sizes)).
    """
    return _Chains(problem, start, schedule, seed).run(deadline, target_s)


class _Chains:
    """The states of all chains: ``position`` (chains, n), ``device`` (chains, positions), ``cost`` (chains,)."""

    def __init__(self, problem: ChunkProblem, start: Placement, schedule: Schedule, seed: int) -> None:
        n, dag = len(problem.dag), problem.dag
        self.problem, self.schedule, self.best = problem, schedule, start
        self.scorer, self.random = Scorer(problem), np.random.default_rng(seed)
        orders = np.array(list(islice(topological_orders(dag), _MOST_ORDERS)), dtype=np.int64)
        self.ranks: Ints = np.argsort(orders, axis=1)  # (orders, n)
        self.after = _matrix(dag.after, n) if n <= _MOST_CLOSED else None
        self.before = None if self.after is None else np.ascontiguousarray(self.after.T)
        self.rows: Ints = np.arange(schedule.n_chains, dtype=np.int64)
        self.position = np.tile(start.position, (schedule.n_chains, 1))
        self.device = np.tile(_padded(problem, start.device), (schedule.n_chains, 1))
        self.shuffle()
        loads = self.loads(self.position, self.device)
        self.cost = _cost(loads, schedule.power)
        self.scale_s = min(float(loads.max(axis=1).min()), problem.ceiling_s)

    def run(self, deadline: float, target_s: float) -> Placement:
        begin, schedule = time.monotonic(), self.schedule
        temperature = 0.0
        for step in range(schedule.n_steps):
            if step % _CLOCK_EVERY == 0:
                now = time.monotonic()
                part = max(step / schedule.n_steps, (now - begin) / max(deadline - begin, 1e-9))
                if part >= 1 or self.best.max_load_s <= target_s:
                    break
                temperature = self.temperature(part)
            if step % _SHUFFLE_EVERY == 0:
                self.shuffle()
            if step % _RESAMPLE_EVERY == _RESAMPLE_EVERY - 1:
                self.resample()
            self.step(temperature, swap=step % 8 == 7)
        return self.best

    def temperature(self, part: float) -> float:
        n_done, part = divmod(part * self.schedule.n_rounds, 1)
        hot = self.schedule.hot / (4 if n_done else 1)
        return self.scale_s * hot * float((_COLD / hot) ** part)

    def loads(self, position: Ints, device: Ints) -> Floats:
        cells = position + (self.rows * device.shape[1])[:, None]
        return self.scorer.loads(device.ravel().take(cells))

    def step(self, temperature: float, *, swap: bool) -> None:
        """Propose one change per chain, and accept it by Metropolis' rule."""
        position, device = self.position, self.device
        if swap:
            device = self.swapped()
        else:
            position = self.moved(position)
            while self.random.random() < _AGAIN:
                position = self.moved(position)
        loads = self.loads(position, device)
        cost = _cost(loads, self.schedule.power)
        taken = cost <= self.cost - temperature * np.log1p(-self.random.random(len(cost)))
        self.position = np.where(taken[:, None], position, self.position)
        self.device = np.where(taken[:, None], device, self.device)
        self.cost = np.where(taken, cost, self.cost)
        most = loads.max(axis=1)
        row = int(most.argmin())
        if most[row] < self.best.max_load_s:
            self.best = compact(position[row], device[row], float(most[row]))

    def moved(self, position: Ints) -> Ints:
        """Take nodes of one chunk of each chain, with all that must follow, to a position near by."""
        n_chains, n = position.shape
        v = self.random.integers(0, n, size=(n_chains,))
        here = position[self.rows, v][:, None]
        far = self.random.geometric(0.63, size=(n_chains, 1))
        later = bool(self.random.random() < 0.5)
        sort = self.random.random()
        closure = self.after if later else self.before
        if sort < 0.35 and closure is not None:
            which = closure.take(v, axis=0)
        else:
            ranks = self.ranks.take(self.random.integers(0, len(self.ranks), size=(n_chains,)), axis=0)
            end = self.slice_end(ranks, position == here, later) if sort >= 0.5 else ranks[self.rows, v]
            if later:
                which = (ranks >= end[:, None]) & (position >= here)
            else:
                which = (ranks <= end[:, None]) & (position <= here)
        if later:
            return np.where(which, np.maximum(position, np.minimum(here + far, self.device.shape[1] - 1)), position)
        return np.where(which, np.minimum(position, np.maximum(here - far, 0)), position)

    def slice_end(self, ranks: Ints, inside: NDArray[np.bool_], later: bool) -> Ints:
        """The rank from which on (or up to which) a few nodes of the chunk lie."""
        few = self.random.geometric(_SLICE, len(ranks)) - 1
        if later:
            return np.where(inside, ranks, -1).max(axis=1) - few  # type: ignore[no-any-return]
        return np.where(inside, ranks, ranks.shape[1]).min(axis=1) + few  # type: ignore[no-any-return]

    def swapped(self) -> Ints:
        """Exchange the devices of two positions."""
        a, b = self.random.integers(0, self.device.shape[1], (2, len(self.device)))
        device = self.device.copy()
        device[self.rows, a], device[self.rows, b] = self.device[self.rows, b], self.device[self.rows, a]
        return device

    def resample(self) -> None:
        """Replace the worst eighth of the chains by the best."""
        order = np.argsort(self.cost, kind="stable")
        few = len(order) // 8
        if few:
            for part in (self.position, self.device, self.cost):
                part[order[-few:]] = part[order[:few]]

    def shuffle(self) -> None:
        """Join chunks next to each other on one device, and spread the empty positions anew; no load changes."""
        n_chains, n_positions = self.device.shape
        used = np.zeros((n_chains, n_positions), dtype=np.bool_)
        np.put_along_axis(used, self.position, True, 1)
        order = np.argsort(~used, axis=1, kind="stable")  # used positions first
        device = np.take_along_axis(self.device, order, 1)
        begins = np.take_along_axis(used, order, 1)
        begins[:, 1:] &= device[:, 1:] != device[:, :-1]
        group = np.cumsum(begins, axis=1) - 1
        rank = np.argsort(self.random.random((n_chains, n_positions)), axis=1)
        slots = np.argsort(rank >= group[:, -1:] + 1, axis=1, kind="stable")  # those for groups, in order, first
        number = np.empty_like(order)
        np.put_along_axis(number, order, np.take_along_axis(slots, group, 1), 1)
        self.position = np.take_along_axis(number, self.position, 1)
        rows = np.broadcast_to(self.rows[:, None], begins.shape)[begins]
        devices = self.spare(rows, device[begins])
        devices[rows, group[begins]] = device[begins]
        self.device = np.empty_like(device)
        np.put_along_axis(self.device, slots, devices, 1)

    def spare(self, rows: Ints, used: Ints) -> Ints:
        """Per chain as many arbitrary entries as it has chunks in use, then its unused chunks' devices at random."""
        n_devices, copies = len(self.problem.devices), self.problem.max_chunks
        count = np.zeros((len(self.rows), n_devices), dtype=np.int64)
        np.add.at(count, (rows, used), 1)
        token = np.repeat(np.arange(n_devices), copies)
        is_free = np.tile(np.arange(copies), n_devices)[None, :] >= count[:, token]
        keys = np.where(is_free, self.random.random(is_free.shape), -1.0)
        return token[np.argsort(keys, axis=1)]


def _cost(loads: Floats, power: float) -> Floats:
    most = loads.max(axis=1)
    part = loads / np.where(most > 0, most, 1.0)[:, None]
    return most * (part**power).sum(axis=1) ** (1 / power)  # type: ignore[no-any-return]


def _padded(problem: ChunkProblem, device: Ints) -> Ints:
    """Append the devices of the chunks that are not in use."""
    spare = [d for d in range(len(problem.devices)) for _ in range(problem.max_chunks - int((device == d).sum()))]
    return np.concatenate([device, np.array(spare, dtype=np.int64)])


def _matrix(masks: Sequence[int], n: int) -> NDArray[np.bool_]:
    words = np.ascontiguousarray(pack(masks, n).astype("<u8", copy=False)).view(np.uint8)
    return np.unpackbits(words, axis=1, count=n, bitorder="little").astype(np.bool_)
