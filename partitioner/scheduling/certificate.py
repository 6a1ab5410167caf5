"""The certificate: CP-SAT bounds, and sometimes betters, a schedule of a small case. Needs ``pip install ortools``."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ...errors import PlanError, StagecutError
from ...runtime.instructions import Action
from .clock import Problem
from .score import Orders, Scored, score

_UNITS = 20_000  # into which the makespan is divided; durations are rounded down, so that bounds stay bounds


def certified(scored: Scored, time_s: float, n_threads: int = 1) -> Scored:
    """Return the best schedule known after ``time_s`` seconds of CP-SAT, with the larger of both lower bounds.

    The bound is of the schedule's own placement, and some ten-thousandths below the exact one, as seconds are rounded
    down to whole units. Microbatches are alike, so those are looked at that pass every stage in order: any schedule can
    be relabelled to be one of them, without a change to its times or its memory. A whole backward is one whose parts
    follow each other, so a weight gradient has no overhead of its own in the bound.

    Raises:
        StagecutError: ``ortools`` is not installed.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise StagecutError("a certificate needs OR-tools", hint="pip install ortools") from error
    if scored.makespan_s <= 0:
        return scored
    model = _Model(cp_model, scored)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_s
    solver.parameters.num_workers = n_threads
    status = solver.solve(model.model)
    bound_s = max(scored.lower_bound_s, solver.best_objective_bound * model.unit_s)
    best = scored
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        with suppress(PlanError):  # rounded down, it may hold a few bytes too many
            found = score(scored.name, scored.problem, model.orders(solver))
            best = min(scored, found, key=lambda one: one.makespan_s)
    return replace(best, lower_bound_s=min(bound_s, best.makespan_s))


class _Model:
    def __init__(self, cp_model: Any, scored: Scored) -> None:
        self.problem: Problem = scored.problem
        self.costs = self.problem.costs
        self.kinds = self.costs.kinds()
        self.unit_s = scored.makespan_s / _UNITS
        self.model = cp_model.CpModel()
        horizon = _UNITS + 1
        self.makespan = self.model.new_int_var(0, horizon, "makespan")
        self.intervals: dict[Action, Any] = {}
        for s in range(self.problem.layout.n_stages):
            for m in range(self.problem.n_microbatches):
                for kind in self.kinds:
                    action = Action(kind, s, m)
                    start = self.model.new_int_var(0, horizon, str(action))
                    size = self._units(self.costs.backward_weight_s[s] if kind == "W" else self.costs.seconds(kind, s))
                    self.intervals[action] = self.model.new_fixed_size_interval_var(start, size, str(action))
                    self.model.add(start + size <= self.makespan)
        self._order()
        for worker in range(self.problem.n_workers):
            stages = self.problem.stages_of(worker)
            own = [self.intervals[a] for a in self.intervals if a.stage in stages]
            self.model.add_no_overlap(own)
            self._limit(worker, stages, horizon)
        for worker, order in enumerate(scored.orders):
            for action, start in zip(order, scored.starts_s(worker)):
                if action in self.intervals:
                    self.model.add_hint(self.intervals[action].start_expr(), int(start / self.unit_s))
        self.model.minimize(self.makespan)

    def _units(self, seconds: float) -> int:
        return math.floor(seconds / self.unit_s * (1 + 1e-12))

    def _after(self, action: Action, before: Action, seconds: float = 0.0) -> None:
        gap = self._units(seconds)
        self.model.add(self.intervals[action].start_expr() >= self.intervals[before].end_expr() + gap)

    def _order(self) -> None:
        back, n = self.kinds[1], self.problem.layout.n_stages
        for action in self.intervals:
            kind, s, m = action.kind, action.stage, action.microbatch
            if m:
                self._after(action, Action(kind, s, m - 1))
            if kind == "F" and s:
                self._after(action, Action("F", s - 1, m), self.problem.link_s(s - 1))
            elif kind == "W":
                self._after(action, Action("I", s, m))
            elif kind == back:
                self._after(action, Action("F", s, m))
                if s + 1 < n:
                    self._after(action, Action(back, s + 1, m), self.problem.link_s(s))

    def _limit(self, worker: int, stages: list[int], horizon: int) -> None:
        limits = self.costs.memory_bytes
        if limits is None or math.isinf(limits[worker]):
            return
        unit = max(limits[worker], 1e-30) / _UNITS
        back, last = self.kinds[1], self.kinds[-1]
        spans, demands = [], []
        for s in stages:
            parts = [(back, self.costs.activation_bytes[s])]
            if last == "W":
                later = self.costs.weight_grad_bytes[s]
                parts = [("I", self.costs.activation_bytes[s] - later), ("W", later)]
            for m in range(self.problem.n_microbatches):
                start = self.intervals[Action("F", s, m)].start_expr()
                for kind, n_bytes in parts:
                    end = self.intervals[Action(kind, s, m)].end_expr()
                    size = self.model.new_int_var(0, horizon, f"held {kind}{s}.{m}")
                    spans.append(self.model.new_interval_var(start, size, end, f"holds {kind}{s}.{m}"))
                    demands.append(math.floor(n_bytes / unit * (1 - 1e-12)))
        self.model.add_cumulative(spans, demands, _UNITS)

    def orders(self, solver: Any) -> Orders:
        """Return each worker's actions by their start; ties, of actions that take no time, as they depend."""
        rank = {"F": 0, "I": 1, "B": 1, "W": 2}
        rows: list[list[tuple[int, int, int, Action]]] = [[] for _ in range(self.problem.n_workers)]
        for action, interval in self.intervals.items():
            begin, end = solver.value(interval.start_expr()), solver.value(interval.end_expr())
            rows[self.problem.owner(action.stage)].append((begin, end, rank[action.kind], action))
        return tuple(tuple(entry[3] for entry in sorted(own, key=lambda entry: entry[:3])) for own in rows)
