"""List scheduling: whenever a worker is free it does the first thing on a list of preferences that it can do."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from ...runtime.instructions import Action
from .clock import Problem

Orders = tuple[tuple[Action, ...], ...]


@dataclass(frozen=True)
class Rule:
    """What a worker prefers.

    Attributes:
        in_flight: by stage, the most microbatches between forward and input gradient, memory permitting.
        backlog: weight gradients that may wait; with more, one of them comes first.
        patience: how much of a weight gradient may be over once an awaited packet is there, as a share of it.
        forward_first: whether forwards come before input gradients.
        oldest_first: of a worker's stages, whether the first one's gradients come before those of later ones.
    """

    in_flight: tuple[int, ...]
    backlog: int
    patience: float
    forward_first: bool = False
    oldest_first: bool = False


def rules(problem: Problem) -> list[Rule]:
    """List the rules that are worth trying.

    A stage that is never to wait for gradients needs as many microbatches in flight as its round trip has periods of
    the busiest worker (Little's law); more help where durations or latencies vary, fewer leave room.
    """
    costs, m = problem.costs, problem.n_microbatches
    period_s = max(sum(costs.work_s(s) for s in problem.stages_of(w)) for w in range(problem.n_workers))
    back = "I" if costs.split_backward else "B"
    n = problem.layout.n_stages
    trips, trip = [0.0] * n, 0.0
    for s in reversed(range(n)):
        trip += costs.seconds("F", s) + costs.seconds(back, s) + (2 * problem.link_s(s) if s + 1 < n else 0.0)
        trips[s] = trip
    limits = {
        tuple(min(m, max(1, math.ceil(scale * trip_s / max(period_s, 1e-30)) + more)) for trip_s in trips)
        for scale in (0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
        for more in (0, 1)
    }
    limits |= {(m,) * n, tuple(min(m, n - s) for s in range(n)), tuple(min(m, 2 * (n - s) - 1) for s in range(n))}
    weights = [(0, 1.0)] if not costs.split_backward else [(m * n, 0.0), (m * n, 0.5), (m * n, 1.0), (0, 1.0), (2, 0.5)]
    several = n > problem.n_workers
    return [
        Rule(limit, backlog, patience, forward_first, oldest)
        for limit in sorted(limits)
        for backlog, patience in weights
        for forward_first in (False, True)
        for oldest in ((False, True) if several else (False,))
    ]


def listed(problem: Problem, rule: Rule) -> Orders | None:
    """Return the orders that a rule leads to; None where memory leaves it stuck. Time O(actions x log workers)."""
    return _Listing(problem, rule).run()


class _Listing:
    def __init__(self, problem: Problem, rule: Rule) -> None:
        self.problem, self.rule, self.costs = problem, rule, problem.costs
        self.m, n = problem.n_microbatches, problem.layout.n_stages
        self.last = n - 1
        self.splits = self.costs.split_backward
        self.back = "I" if self.splits else "B"
        self.owner = [problem.owner(s) for s in range(n)]
        self.stages = [problem.stages_of(w) for w in range(problem.n_workers)]
        limits = self.costs.memory_bytes
        self.room = [math.inf] * problem.n_workers if limits is None else [x * (1 + 1e-9) for x in limits]
        # What must stay free so that a microbatch that was let in can pass the worker's later stages too.
        self.reserve = [
            sum(self.costs.activation_bytes[t] for t in self.stages[self.owner[s]] if t > s) for s in range(n)
        ]
        self.next = {kind: [0] * n for kind in ("F", self.back, "W")}
        self.forward_at = [[0.0] * self.m] + [[math.inf] * self.m for _ in range(n - 1)]
        self.back_at = [[math.inf] * self.m for _ in range(n)]
        self.free_at = [0.0] * problem.n_workers
        self.orders: list[list[Action]] = [[] for _ in range(problem.n_workers)]
        self.events = [(0.0, w) for w in range(problem.n_workers)]

    def run(self) -> Orders | None:
        while self.events:
            now, worker = heapq.heappop(self.events)
            if self.free_at[worker] > now:
                continue
            chosen = self._choose(worker, now)
            if chosen is not None:
                self._start(worker, *chosen, now)
        total = self.m * (3 if self.splits else 2) * len(self.owner)
        if sum(map(len, self.orders)) < total:
            return None
        return tuple(map(tuple, self.orders))

    def _choose(self, worker: int, now: float) -> tuple[str, int] | None:
        weight = self._pending_weight(worker)
        if weight is not None and self._n_pending(worker) > self.rule.backlog:
            return "W", weight
        back, forward = self._ready_back(worker, now), self._ready_forward(worker, now)
        if forward is not None and (back is None or self.rule.forward_first):
            return "F", forward
        if back is not None:
            return self.back, back
        if weight is None:
            return None
        over = now + self.costs.seconds("W", weight) * (1 - self.rule.patience)
        awaited = self._next_arrival(worker)
        if over <= awaited + 1e-12:
            return "W", weight
        return None  # the arrival is an event of its own

    def _pending_weight(self, worker: int) -> int | None:
        if not self.splits:
            return None
        waiting = [s for s in self.stages[worker] if self.next["W"][s] < self.next["I"][s]]
        return max(waiting, key=lambda s: self.next["I"][s] - self.next["W"][s]) if waiting else None

    def _n_pending(self, worker: int) -> int:
        return sum(self.next["I"][s] - self.next["W"][s] for s in self.stages[worker])

    def _ready_back(self, worker: int, now: float) -> int | None:
        order = self.stages[worker] if self.rule.oldest_first else reversed(self.stages[worker])
        for s in order:
            m = self.next[self.back][s]
            if m < self.m and self.back_at[s][m] <= now:
                return s
        return None

    def _ready_forward(self, worker: int, now: float) -> int | None:
        for s in reversed(self.stages[worker]):
            m = self.next["F"][s]
            if m < self.m and self.forward_at[s][m] <= now and self._may_forward(worker, s):
                return s
        return None

    def _may_forward(self, worker: int, s: int) -> bool:
        if self.next["F"][s] - self.next[self.back][s] >= self.rule.in_flight[s]:
            return False
        return self.costs.activation_bytes[s] + self.reserve[s] <= self.room[worker]

    def _next_arrival(self, worker: int) -> float:
        """Return when something else than a weight gradient can start, as far as is known."""
        times = [math.inf]
        for s in self.stages[worker]:
            m = self.next[self.back][s]
            if m < self.m:
                times.append(self.back_at[s][m])
            m = self.next["F"][s]
            if m < self.m and self._may_forward(worker, s):
                times.append(self.forward_at[s][m])
        return min(times)

    def _start(self, worker: int, kind: str, s: int, now: float) -> None:
        m = self.next[kind][s]
        self.next[kind][s] = m + 1
        self.orders[worker].append(Action(kind, s, m))
        end = self.free_at[worker] = now + self.costs.seconds(kind, s)
        heapq.heappush(self.events, (end, worker))
        own, weight = self.costs.activation_bytes[s], self.costs.weight_grad_bytes[s]
        if kind == "F":
            self.room[worker] -= own
            if s == self.last:
                self.back_at[s][m] = end
            else:
                self._arrive(self.forward_at, s + 1, m, end + self.problem.link_s(s))
            return
        self.room[worker] += {"I": own - weight, "W": weight, "B": own}[kind]
        if kind != "W" and s > 0:
            self._arrive(self.back_at, s - 1, m, end + self.problem.link_s(s - 1))

    def _arrive(self, at: list[list[float]], s: int, m: int, when: float) -> None:
        at[s][m] = when
        heapq.heappush(self.events, (when, self.owner[s]))
