"""The clock of orders: when each computation starts if every worker goes on as soon as it can.

The simulator (:mod:`stagecut.partitioner.simulate`) runs programs, with all that a runtime does. A search looks at
thousands of orders of one problem, so this clock knows computations and latencies only; both agree on these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.instructions import Action, Layout
from .costs import PipelineCosts

# What is needed (-1: nothing from elsewhere), after how long it is here, seconds, what is made (-1: nothing for others)
Step = tuple[int, float, float, int]


@dataclass(frozen=True)
class Problem:
    """Costs, a placement with one worker per stage, and a microbatch count."""

    costs: PipelineCosts
    layout: Layout
    n_microbatches: int

    @property
    def n_workers(self) -> int:
        """Count the workers."""
        return self.layout.n_workers

    def owner(self, stage: int) -> int:
        """Return the worker of a stage."""
        return self.layout.workers[stage][0]

    def stages_of(self, worker: int) -> list[int]:
        """List the stages of a worker."""
        return [s for s in range(self.layout.n_stages) if self.owner(s) == worker]

    def link_s(self, s: int) -> float:
        """Return how long results travel between stages s and s + 1."""
        return 0.0 if self.owner(s) == self.owner(s + 1) else self.costs.link_s[s]

    def step(self, action: Action) -> Step:
        """Describe an action for :func:`run`."""
        m_count, n, s, m = self.n_microbatches, self.layout.n_stages, action.stage, action.microbatch
        seconds = self.costs.seconds(action.kind, s)
        if action.kind == "F":
            return (-1, 0.0, seconds, m) if s == 0 else (
                (s - 1) * m_count + m, self.link_s(s - 1), seconds, s * m_count + m)  # fmt: skip
        if action.kind == "W":
            return -1, 0.0, seconds, -1
        own = (n + s) * m_count + m
        if s == n - 1:
            return -1, 0.0, seconds, own
        return own + m_count, self.link_s(s), seconds, own

    def steps(self, orders: Sequence[Sequence[Action]]) -> list[list[Step]]:
        """Describe orders for :func:`run`."""
        return [[self.step(action) for action in order] for order in orders]


def run(steps: Sequence[Sequence[Step]], n_results: int) -> list[list[float]] | None:
    """Return, per worker, when each of its steps ends; None if workers wait for each other.

    ``n_results`` is above every number of a result. Time O(steps).
    """
    done = [-1.0] * n_results
    waiting: dict[int, int] = {}
    at = [0] * len(steps)
    ends: list[list[float]] = [[] for _ in steps]
    ready = list(range(len(steps)))
    while ready:
        worker = ready.pop()
        mine, own, i = steps[worker], ends[worker], at[worker]
        now = own[-1] if own else 0.0
        n = len(mine)
        while i < n:
            needed, delay, seconds, result = mine[i]
            if needed >= 0:
                there = done[needed]
                if there < 0:
                    waiting[needed] = worker
                    break
                there += delay
                if there > now:
                    now = there
            now += seconds
            own.append(now)
            if result >= 0:
                done[result] = now
                if result in waiting:
                    ready.append(waiting.pop(result))
            i += 1
        at[worker] = i
    if any(i < len(mine) for i, mine in zip(at, steps)):
        return None
    return ends


def peak_bytes(costs: PipelineCosts, order: Sequence[Action]) -> float:
    """Return the most that a worker holds at once under an order."""
    held = peak = 0.0
    for action in order:
        s = action.stage
        if action.kind == "F":
            held += costs.activation_bytes[s]
            peak = max(peak, held)
        elif action.kind == "I":
            held -= costs.activation_bytes[s] - costs.weight_grad_bytes[s]
        else:
            held -= costs.weight_grad_bytes[s] if action.kind == "W" else costs.activation_bytes[s]
    return peak


def peak_in_flight(order: Sequence[Action]) -> int:
    """Return the most microbatches of single stages that a worker holds, in part or whole."""
    held = peak = 0
    for action in order:
        held += 1 if action.kind == "F" else -1 if action.kind in "BW" else 0
        peak = max(peak, held)
    return peak
