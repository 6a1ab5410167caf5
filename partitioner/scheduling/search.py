"""The search for a schedule: all published ones that fit, list scheduling by many rules, then local search."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from ...errors import ConstraintError, InfeasibleError, PlanError
from ...runtime.schedules.families import FAMILIES
from .bounds import lower_bound_s
from .clock import Problem, run
from .costs import PipelineCosts
from .family import placed, workers_of
from .listing import Orders, listed, rules
from .local_search import HEATS, improved
from .score import Scored, score

# Actions that the clock times, and that list scheduling places, in a second, about; budgets are counted in them, so
# that the same seed gives the same schedule on any machine.
_ACTIONS_PER_S = 5_000_000
_LISTED_PER_S = 200_000
_SHARE_OF_LISTING = 0.4
_LEAST_RULES = 8
_STARTS = 2  # best candidates that local search sets out from
_JITTER = 0.05
_DRAWS = 8


def search(
    costs: PipelineCosts,
    n_microbatches: int,
    n_workers: int | None = None,
    *,
    time_s: float = 5.0,
    seed: int = 0,
    placements: Sequence[str] = ("chain", "loop", "vee"),
    progress: Callable[[str], None] = lambda what: None,
) -> Scored:
    """Find a schedule with a short makespan for given costs, within the workers' memory.

    Stages are placed in all of ``placements`` that their number allows. In the pool are all published
    schedules, so none that fits is better than the result. Of equally short ones that is taken which is shortest when
    durations vary by 5 %. ``lower_bound_s`` of the result holds for all placements that were tried.

    ``time_s`` is counted in timed actions at a nominal pace: the same seed and time give the same schedule.

    Raises:
        ConstraintError: stages cannot be spread evenly over the workers, or there are no microbatches.
        InfeasibleError: a microbatch alone does not fit on some worker, with the bytes that are missing.
    """
    if n_microbatches < 1:
        raise ConstraintError(f"a schedule needs at least one microbatch, got {n_microbatches}")
    n = workers_of(costs, "chain", n_workers)
    several = costs.n_stages > n > 1
    allowed = [name for name in placements if name == "chain" or (several and _allows(costs.n_stages, n, name))]
    if not allowed:
        raise ConstraintError(f"{costs.n_stages} stages on {n} workers cannot be placed as {' or '.join(placements)}")
    layouts = [placed(costs.n_stages, n, name) for name in allowed]
    problems = [Problem(costs, layout, n_microbatches) for layout in layouts]
    _check_fits(problems)
    found: list[tuple[float, int, str, Orders]] = []  # makespan, number of the problem, where it is from
    for index, problem in enumerate(problems):
        progress(f"list scheduling, placement {index + 1} of {len(problems)}")
        listing_s = _SHARE_OF_LISTING * time_s / len(problems)
        found += [(s, index, name, orders) for s, name, orders in _candidates(problem, listing_s)]
    if not found:
        raise InfeasibleError(
            "no schedule was found that fits in memory_bytes, though single microbatches do",
            hint="raise memory_bytes by one microbatch's activations per worker",
        )
    found.sort(key=lambda entry: entry[0])
    bound_s = min(map(lower_bound_s, problems))
    budget = int((1 - _SHARE_OF_LISTING) * time_s * _ACTIONS_PER_S)
    ways = list(itertools.product(found[:_STARTS], HEATS))
    for number, ((_, index, name, orders), heat) in enumerate(ways):
        progress(f"local search {number + 1} of {len(ways)}, from {found[0][0]:.6g} s; no less than {bound_s:.6g} s")
        better = improved(problems[index], orders, budget // len(ways), seed + number, heat, bound_s)
        found.append((_makespan_s(problems[index], better), index, name, better))
    best = min(entry[0] for entry in found)
    ties = [entry for entry in found if entry[0] <= best * (1 + 1e-9)]
    _, index, _, orders = min(ties, key=lambda entry: _under_jitter_s(problems[entry[1]], entry[3], seed))
    return replace(score("search", problems[index], orders), lower_bound_s=bound_s)


def _allows(n_stages: int, n_workers: int, placement: str) -> bool:
    return placement != "vee" or n_stages == 2 * n_workers


def _candidates(problem: Problem, listing_s: float) -> list[tuple[float, str, Orders]]:
    """Return published schedules of a problem that fit, and those of as many rules as there is time for, evenly spread.

    Each order is there once.
    """
    pool: dict[Orders, str] = {}
    for family in FAMILIES.values():
        if family.trains and (problem.costs.split_backward or not family.splits_backward):
            try:
                orders = family.make(problem.layout, problem.n_microbatches)
                score(family.name, problem, orders)
            except PlanError:  # not on this placement, not with so few microbatches, or too much memory
                continue
            pool.setdefault(orders, family.name)
    every = rules(problem)
    n_actions = problem.n_microbatches * problem.layout.n_stages * len(problem.costs.kinds())
    step = max(1, math.ceil(len(every) * n_actions / max(1.0, listing_s * _LISTED_PER_S)))
    for rule in every[:: min(step, max(1, len(every) // _LEAST_RULES))]:
        made = listed(problem, rule)
        if made is not None:
            pool.setdefault(made, "list scheduling")
    return [(_makespan_s(problem, orders), name, orders) for orders, name in pool.items()]


def _makespan_s(problem: Problem, orders: Orders) -> float:
    ends = run(problem.steps(orders), 2 * problem.layout.n_stages * problem.n_microbatches)
    assert ends is not None
    return max(own[-1] for own in ends if own)


def _under_jitter_s(problem: Problem, orders: Orders, seed: int) -> float:
    """Return the mean makespan over some draws in which every computation takes up to 5 % longer or shorter."""
    chance = random.Random(seed)
    total = 0.0
    for _ in range(_DRAWS):
        steps = [
            [(a, b, seconds * (1 + _JITTER * (2 * chance.random() - 1)), c) for a, b, seconds, c in own]
            for own in problem.steps(orders)
        ]
        ends = run(steps, 2 * problem.layout.n_stages * problem.n_microbatches)
        assert ends is not None
        total += max(own[-1] for own in ends if own)
    return total / _DRAWS


def _check_fits(problems: list[Problem]) -> None:
    """Refuse limits within which not even one microbatch at a time can pass."""
    faults = []
    for problem in problems:
        limits = problem.costs.memory_bytes
        short = [
            (sum(problem.costs.activation_bytes[s] for s in problem.stages_of(w)) - limit, w, limit)
            for w, limit in enumerate(limits or ())
        ]
        worst = max(short, default=(0.0, 0, 0.0))
        if worst[0] <= 1e-9 * worst[2]:
            return
        faults.append(worst)
    missing, worker, limit = min(faults)
    raise InfeasibleError(
        f"one microbatch needs {limit + missing:,.0f} bytes on worker {worker}, {missing:,.0f} more than its "
        f"memory_bytes of {limit:,.0f}",
        hint=f"raise memory_bytes[{worker}] to {limit + missing:.0f}, or make microbatches smaller",
    )
