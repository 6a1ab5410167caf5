"""What a schedule comes to: makespan, bubbles by cause, memory, and the bound below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConstraintError, InfeasibleError
from ...runtime.instructions import Action
from .bounds import forward_bound_s, lower_bound_s
from .clock import Problem, peak_bytes, peak_in_flight, run

Orders = tuple[tuple[Action, ...], ...]


@dataclass(frozen=True)
class Scored:
    """A schedule with its times.

    Attributes:
        name: of the family, or ``"search"``.
        problem: what it is a schedule of.
        orders: per worker, its computations.
        ends_s: per worker, when each of them ends, in seconds.
        lower_bound_s: what no schedule of the problem on the same placement can beat.
    """

    name: str
    problem: Problem
    orders: Orders
    ends_s: tuple[tuple[float, ...], ...]
    lower_bound_s: float

    @property
    def makespan_s(self) -> float:
        """Return when the last worker is through."""
        return max(ends[-1] for ends in self.ends_s if ends)

    def starts_s(self, worker: int) -> tuple[float, ...]:
        """Return when each computation of a worker starts."""
        costs = self.problem.costs
        return tuple(end - costs.seconds(a.kind, a.stage) for a, end in zip(self.orders[worker], self.ends_s[worker]))

    def busy_s(self, worker: int) -> float:
        """Return the seconds that a worker computes, overhead included."""
        return math.fsum(self.problem.costs.seconds(a.kind, a.stage) for a in self.orders[worker])

    @property
    def longest_span_s(self) -> float:
        """Return the longest time from a worker's first start to its last end."""
        return max(ends[-1] - self.starts_s(w)[0] for w, ends in enumerate(self.ends_s) if ends)

    @property
    def bubble(self) -> float:
        """Return the share of all workers' time until the makespan in which they do not compute."""
        return self._idle_of(self.makespan_s)

    @property
    def span_bubble(self) -> float:
        """Return the share of the longest span of a worker in which workers do not compute, as papers report it."""
        return self._idle_of(self.longest_span_s)

    def _idle_of(self, each_s: float) -> float:
        total = each_s * len(self.orders)
        return max(0.0, 1.0 - math.fsum(map(self.busy_s, range(len(self.orders)))) / total) if total else 0.0

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """Return the most bytes that each worker holds."""
        return tuple(peak_bytes(self.problem.costs, order) for order in self.orders)

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """Return the most microbatches that each worker holds, those of each of its stages counted by themselves."""
        return tuple(map(peak_in_flight, self.orders))


def score(name: str, problem: Problem, orders: Orders) -> Scored:
    """Time a schedule.

    Raises:
        ConstraintError: a computation is missing, there twice, or on the wrong worker; a backward comes before its
            forward; or the workers wait for each other.
        InfeasibleError: a worker holds more than its memory.
    """
    _check_complete(name, problem, orders)
    ends = run(problem.steps(orders), 2 * problem.layout.n_stages * problem.n_microbatches)
    if ends is None:
        raise ConstraintError(f"{name}: the orders wait for each other in a circle")
    limits = problem.costs.memory_bytes
    for worker, order in enumerate(orders):
        peak = peak_bytes(problem.costs, order)
        if limits is not None and peak > limits[worker] * (1 + 1e-9):
            raise InfeasibleError(
                f"{name} holds {peak:,.0f} bytes on worker {worker}, {peak - limits[worker]:,.0f} more than its "
                f"memory_bytes of {limits[worker]:,.0f}",
                hint="--name search looks for an order that fits",
            )
    trains = any(action.kind != "F" for order in orders for action in order)
    bound_s = lower_bound_s(problem) if trains else forward_bound_s(problem)
    return Scored(name, problem, orders, tuple(map(tuple, ends)), bound_s)


def _check_complete(name: str, problem: Problem, orders: Sequence[Sequence[Action]]) -> None:
    trains = any(action.kind != "F" for order in orders for action in order)
    seen: set[Action] = set()
    for worker, order in enumerate(orders):
        for action in order:
            s, m = action.stage, action.microbatch
            where = f"{name}, worker {worker}: {action}"
            if not (0 <= s < problem.layout.n_stages and 0 <= m < problem.n_microbatches):
                raise ConstraintError(f"{where} names a stage or microbatch that is not there")
            if problem.owner(s) != worker:
                raise ConstraintError(f"{where} is of a stage that worker {problem.owner(s)} owns")
            if action in seen:
                raise ConstraintError(f"{where} is there twice")
            if action.kind in "IW" and not problem.costs.split_backward:
                raise ConstraintError(
                    f"{where} is half a backward, and split_backward is false",
                    hint='set "split_backward": true, or take a schedule with whole backwards',
                )
            before = {"I": "F", "B": "F", "W": "I"}.get(action.kind)
            if before and Action(before, s, m) not in seen:
                raise ConstraintError(f"{where} comes before {Action(before, s, m)}")
            if action.kind in "IB" and Action("IB"[action.kind == "I"], s, m) in seen:
                raise ConstraintError(f"{where} computes the input gradient again")
            seen.add(action)
    for s in range(problem.layout.n_stages):
        for m in range(problem.n_microbatches):
            whole = Action("B", s, m) in seen or {Action("I", s, m), Action("W", s, m)} <= seen
            if Action("F", s, m) not in seen or (trains and not whole):
                raise ConstraintError(f"{name}: stage {s} does not compute all of microbatch {m}")
