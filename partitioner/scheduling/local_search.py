"""Local search: move computations that lie on the critical path to other places of their worker's order.

A makespan falls only if its critical path does, and on a worker that path is a run of computations without a gap
between them (van Laarhoven, Aarts and Lenstra, 1992, https://doi.org/10.1287/opre.40.1.113, for job shops). So moves
take a computation out of such a run and put it a few places earlier or later. Worse orders are accepted now and then,
ever more rarely (simulated annealing).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ...runtime.instructions import Action
from .clock import Problem, peak_bytes, run
from .critical import critical_runs

Orders = tuple[tuple[Action, ...], ...]
_FARTHEST = 8  # places that one move spans
_LOOK = 10  # what a move costs that is refused at sight, in timed actions
# Temperatures at first, as shares of the makespan: 4 workers and 8 microbatches came out optimal from hot starts and
# 2 % above that from cold ones; 8 workers and 32 microbatches the other way round, as there the budget is soon spent.
HEATS = (0.03, 0.005)


def improved(
    problem: Problem, orders: Orders, n_actions: int, seed: int, heat: float = HEATS[0], stop_s: float = 0.0
) -> Orders:
    """Return orders whose makespan is no longer, after timing about ``n_actions`` actions in all.

    ``heat`` is the temperature at first, as a share of the makespan. The same seed gives the same orders. The search
    ends early at ``stop_s``, a bound that cannot be beaten.
    """
    return _Search(problem, orders, random.Random(seed)).run(n_actions, heat, stop_s)


class _Search:
    def __init__(self, problem: Problem, orders: Orders, chance: random.Random) -> None:
        self.problem, self.chance = problem, chance
        self.n_results = 2 * problem.layout.n_stages * problem.n_microbatches
        self.orders = [list(order) for order in orders]
        self.steps = problem.steps(orders)
        self.step_of = {a: step for order, own in zip(orders, self.steps) for a, step in zip(order, own)}
        self.limits = problem.costs.memory_bytes
        ends = run(self.steps, self.n_results)
        assert ends is not None
        self.ends = ends
        self.n_actions = sum(map(len, self.orders))
        self.spent = 0  # actions timed, and what other work is worth in them

    def run(self, n_actions: int, heat: float, stop_s: float) -> Orders:
        now_s = best_s = max(own[-1] for own in self.ends if own)
        best = tuple(map(tuple, self.orders))
        runs = critical_runs(self.problem, self.orders, self.ends)
        while self.spent < n_actions and best_s > stop_s * (1 + 1e-9):
            temperature_s = heat * best_s * (1.0 - self.spent / n_actions)
            made = self._try(runs, now_s - temperature_s * math.log(max(self.chance.random(), 1e-12)))
            if made is None:
                continue
            now_s = made
            runs = critical_runs(self.problem, self.orders, self.ends)
            if now_s < best_s * (1 - 1e-12):
                best_s, best = now_s, tuple(map(tuple, self.orders))
        return best

    def _try(self, runs: Sequence[tuple[int, int, int]], at_most_s: float) -> float | None:
        """Make a random move and keep it if the makespan is at most that; return the makespan then."""
        self.spent += _LOOK
        worker, first, last = self.chance.choice(runs)
        source = self.chance.randint(first, last)
        order = self.orders[worker]
        target = source + self.chance.choice((-1, 1)) * self.chance.randint(1, _FARTHEST)
        target = min(max(target, 0), len(order) - 1)
        if target == source or not _may_move(order, source, target):
            return None
        moved = order.copy()
        moved.insert(target, moved.pop(source))
        if self.limits is not None and peak_bytes(self.problem.costs, moved) > self.limits[worker] * (1 + 1e-9):
            return None
        self.spent += self.n_actions
        before = self.steps[worker]
        self.steps[worker] = [self.step_of[action] for action in moved]
        ends = run(self.steps, self.n_results)
        if ends is not None:
            makespan_s = max(own[-1] for own in ends if own)
            if makespan_s <= at_most_s:
                self.orders[worker], self.ends = moved, ends
                return makespan_s
        self.steps[worker] = before
        return None


_RANK = {"F": 0, "I": 1, "B": 1, "W": 2}


def _may_move(order: Sequence[Action], source: int, target: int) -> bool:
    """Say whether a computation stays behind what it needs and in line with its like."""
    moved = order[source]
    passed = order[target:source] if target < source else order[source + 1 : target + 1]
    for other in passed:
        if other.stage != moved.stage:
            continue
        if other.kind == moved.kind:
            return False
        if other.microbatch == moved.microbatch and (_RANK[other.kind] < _RANK[moved.kind]) == (target < source):
            return False
    return True
