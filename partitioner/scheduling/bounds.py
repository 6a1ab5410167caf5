"""Lower bounds on the makespan of any schedule of a problem: load, head and tail, memory, residence."""

from __future__ import annotations

from .clock import Problem


def lower_bound_s(problem: Problem) -> float:
    """Return seconds that no order of the problem's computations can beat.

    The largest over all workers of these, each proven by itself:

    - *load*: nothing reaches a worker before the forwards of earlier stages are through (head); it then has all its
      work to do; and after its last computation gradients still travel to the first stage (tail).
    - *wait*: before its first gradient comes back a worker can only do forwards, of as many microbatches as fit.
    - *residence*: a microbatch stays on a stage from its forward until its gradient has come back. If K fit at once,
      forward n + K starts no earlier than forward n and a round trip.

    Time O(stages^2).
    """
    return max(_Worker(problem, worker).bound_s() for worker in range(problem.n_workers))


def forward_bound_s(problem: Problem) -> float:
    """Return seconds that no order of the forwards alone can beat: load, with the way to a worker and from it."""
    return max(_Worker(problem, worker).forward_bound_s() for worker in range(problem.n_workers))


class _Worker:
    def __init__(self, problem: Problem, worker: int) -> None:
        self.problem, self.costs, self.m = problem, problem.costs, problem.n_microbatches
        self.stages = problem.stages_of(worker)
        self.splits = self.costs.split_backward
        self.back = "I" if self.splits else "B"
        limits = self.costs.memory_bytes
        self.limit = None if limits is None else limits[worker]

    def bound_s(self) -> float:
        head_s = min(map(self._head_s, self.stages))
        tail_s = min(map(self._tail_s, self.stages))
        load_s = self.m * sum(self._work_s(s) for s in self.stages)
        wait_s = max(0.0, min(map(self._first_gradient_s, self.stages)) - head_s - self._ahead_s())
        if not self.splits:
            bound = head_s + load_s + tail_s + wait_s
        else:  # weight gradients can fill the tail
            there_and_back = self.m * sum(self._seconds("F", s) + self._seconds("I", s) for s in self.stages)
            bound = head_s + wait_s + max(load_s, there_and_back + tail_s)
        return max([bound, *map(self._residence_s, self.stages)])

    def forward_bound_s(self) -> float:
        n = self.problem.layout.n_stages
        load_s = self.m * sum(self._seconds("F", s) for s in self.stages)
        after = [sum(self.problem.link_s(t - 1) + self._seconds("F", t) for t in range(s + 1, n)) for s in self.stages]
        return min(map(self._head_s, self.stages)) + load_s + min(after)

    def _seconds(self, kind: str, s: int) -> float:
        return self.costs.seconds(kind, s)

    def _work_s(self, s: int) -> float:
        return self.costs.work_s(s)

    def _head_s(self, s: int) -> float:
        return sum(self._seconds("F", t) + self.problem.link_s(t) for t in range(s))

    def _tail_s(self, s: int) -> float:
        """Return the least seconds from the end of a stage's last input gradient to the end of the step."""
        most, passed = self._weight_s(s), 0.0
        for t in reversed(range(s)):
            passed += self.problem.link_s(t) + self._seconds(self.back, t)
            most = max(most, passed + self._weight_s(t))
        return most

    def _weight_s(self, s: int) -> float:
        """Return what follows an input gradient at least, which is no overhead where the backward is whole."""
        return self.costs.backward_weight_s[s] if self.splits else 0.0

    def _round_trip_s(self, s: int) -> float:
        """Return the least seconds from the start of a forward on a stage to the end of its input gradient there."""
        n = self.problem.layout.n_stages
        there = sum(self._seconds("F", t) + self._seconds(self.back, t) for t in range(s, n))
        return there + 2 * sum(self.problem.link_s(t) for t in range(s, n - 1))

    def _first_gradient_s(self, s: int) -> float:
        """Return when an input gradient can start on a stage at the earliest."""
        return self._head_s(s) + self._round_trip_s(s) - self._seconds(self.back, s)

    def _fits(self, s: int) -> int:
        """Count the microbatches of a stage that fit on its worker, at most all."""
        bytes_each = self.costs.activation_bytes[s]
        if self.limit is None or bytes_each <= 0 or self.m * bytes_each <= self.limit * (1 + 1e-9):
            return self.m
        return int(self.limit * (1 + 1e-9) / bytes_each)

    def _ahead_s(self) -> float:
        """Return the most seconds of forwards that a worker can do before its first gradient."""
        room = float("inf") if self.limit is None else self.limit * (1 + 1e-9)
        seconds = 0.0
        each = [(self.costs.activation_bytes[s], self._seconds("F", s)) for s in self.stages]
        for n_bytes, forward_s in sorted(each, key=lambda pair: pair[0] / max(pair[1], 1e-30)):
            count = float(self.m) if n_bytes <= 0 else min(float(self.m), room / n_bytes)
            if len(self.stages) == 1:
                count = int(count)
            seconds += count * forward_s
            room -= count * n_bytes
        return seconds

    def _residence_s(self, s: int) -> float:
        fits = self._fits(s)
        if fits == 0:
            return float("inf")
        stay_s, forward_s = self._round_trip_s(s), self._seconds("F", s)
        rounds, rest = divmod(self.m - 1, fits)
        last_start_s = max(rounds * stay_s + rest * forward_s, (self.m - 1) * forward_s)
        return self._head_s(s) + last_start_s + stay_s + self._tail_s(s)
