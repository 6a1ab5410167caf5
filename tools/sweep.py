"""The subcommand ``partition-viz sweep``: one model under many configurations, step against memory."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import StagecutError
from ..partitioner.plan import Plan
from .tables import Table
from .words import clean, duration, share, size

# What is varied: the arguments of stagecut.compile.
VARIED = ("stages", "replicas", "microbatches", "schedule", "recompute")


@dataclass(frozen=True)
class Outcome:
    """What one configuration gives: a predicted step and memory, or why there is no plan.

    ``best`` says that no other configuration has a shorter step with as little memory, or less memory in as short a
    step (the Pareto front).
    """

    arguments: dict[str, Any]
    step_s: float | None = None
    bubble: float | None = None
    memory_bytes: int | None = None
    problem: str | None = None
    best: bool = False

    def call(self) -> str:
        """Write the arguments as they are given to ``stagecut.compile``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())


def configurations(choices: dict[str, Sequence[Any] | None]) -> list[dict[str, Any]]:
    """List all combinations of what was given; what was not is left to the planner.

    >>> configurations({"stages": [2, 4], "microbatches": None, "schedule": ["1f1b"]})
    [{'stages': 2, 'schedule': '1f1b'}, {'stages': 4, 'schedule': '1f1b'}]
    """
    given = {name: values for name, values in choices.items() if values}
    return [dict(zip(given, values)) for values in itertools.product(*given.values())]


def sweep(make: Callable[..., Plan], wanted: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Plan every configuration; ``make(**arguments)`` returns its plan."""
    found = []
    for index, arguments in enumerate(wanted):
        if sys.stderr.isatty():
            print(f"\rpartition-viz: {index + 1} of {len(wanted)}", end="", file=sys.stderr, flush=True)
        try:
            plan = make(**arguments)
        except StagecutError as error:
            found.append(Outcome(arguments, problem=error.message))
            continue
        memory = max(stage.device_bytes for stage in plan.stages)
        found.append(Outcome(arguments, plan.prediction.step_s, plan.prediction.bubble, memory))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return _judged(found)


def _judged(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Mark the Pareto front, and put the fastest first; those without a plan last."""
    points = [(o.step_s, o.memory_bytes) for o in outcomes if o.step_s is not None and o.memory_bytes is not None]

    def is_best(outcome: Outcome) -> bool:
        if outcome.step_s is None or outcome.memory_bytes is None:
            return False
        step_s, memory = outcome.step_s, outcome.memory_bytes
        return not any((s, m) != (step_s, memory) and s <= step_s and m <= memory for s, m in points)

    marked = [Outcome(**{**asdict(outcome), "best": is_best(outcome)}) for outcome in outcomes]
    return sorted(marked, key=lambda o: (o.step_s is None, o.step_s or 0.0, o.memory_bytes or 0))


def sweep_table(outcomes: Sequence[Outcome]) -> Table:
    """List the outcomes, each with what to give to ``stagecut.compile``."""
    header = ("step", "bubble", "memory", "", "stagecut.compile(model, devices, ...)")
    rows = []
    for o in outcomes:
        if o.step_s is None or o.bubble is None or o.memory_bytes is None:
            rows.append(("-", "-", "-", "no plan", f"{clean(o.call())}: {clean(o.problem or '')}"))
        else:
            mark = "best" if o.best else ""
            rows.append((duration(o.step_s), share(o.bubble), size(o.memory_bytes), mark, clean(o.call())))
    return Table(header, (True, True, True, False, False), tuple(rows), "nothing was asked for")


def sweep_json(outcomes: Sequence[Outcome]) -> str:
    """Write the outcomes as JSON."""
    return json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n"
