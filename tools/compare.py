"""The subcommand ``partition-viz compare``: plans beside each other."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import StagecutError
from ..partitioner.measured_run import MeasuredRun
from ..partitioner.plan import Plan
from .metrics import COUNT, SHARE, Metric, metrics_of
from .tables import Table
from .words import clean, count

_LISTED = 12
Given = tuple[Plan, MeasuredRun | None]


def check_count(paths: Sequence[Path]) -> None:
    """Refuse a single plan.

    Raises:
        StagecutError: there is nothing to compare it with.
    """
    if len(paths) < 2:
        raise StagecutError("compare takes two plans or more", hint="partition-viz show PLAN.json for one")


def numbers_table(names: Sequence[str], plans: Sequence[Given]) -> Table:
    """List the numbers of plans, and of their runs, with what each is of the first plan's."""
    every = [metrics_of(plan, plan.predicted, run) for plan, run in plans]
    rows = [
        (name, *(_cell(found.get(name), every[0].get(name), index) for index, found in enumerate(every)))
        for name in dict.fromkeys(name for found in every for name in found)
    ]
    orders = ("schedule", *(clean(plan.schedule) for plan, _ in plans))
    header = ("", *(clean(name) for name in names))
    return Table(header, (False, *(True for _ in plans)), (orders, *rows), "")


def _cell(metric: Metric | None, first: Metric | None, index: int) -> str:
    if metric is None:
        return "-"
    if index == 0 or first is None or not (math.isfinite(metric.value) and math.isfinite(first.value)):
        return str(metric)
    if metric.value == first.value:
        return f"{metric} (=)"
    if metric.kind == COUNT:
        return str(metric)
    if metric.kind == SHARE:
        return f"{metric} ({_signed((metric.value - first.value) * 100)} points)"
    return f"{metric} ({_signed((metric.value / first.value - 1) * 100)}%)" if first.value else str(metric)


def _signed(number: float) -> str:
    """Write a change; one that is too small to see has no sign.

    >>> _signed(12.4), _signed(-0.6), _signed(-0.3), _signed(0.3)
    ('+12', '-1', '0', '0')
    """
    return f"{number:+.0f}" if round(number) else "0"


def moves(first: Plan, other: Plan) -> list[str]:
    """Say which ops are on another stage in ``other``, or how the graphs differ."""
    if first.fingerprint != other.fingerprint:
        return [f"another graph: {count(len(first.ops), 'op')} and {count(len(other.ops), 'op')}"]
    stages = {op.name: op.stage for op in other.ops}
    moved = [(op, stages[op.name]) for op in first.ops if stages[op.name] != op.stage]
    if not moved:
        return ["the same cut"]
    lines = [f"{count(len(moved), 'op')} of {len(first.ops)} on another stage"]
    lines += [f"  {clean(op.name)} ({clean(op.module_path)}): {op.stage} -> {to}" for op, to in moved[:_LISTED]]
    if len(moved) > _LISTED:
        lines.append(f"  and {len(moved) - _LISTED} more")
    return lines


def record(names: Sequence[str], plans: Sequence[Given]) -> str:
    """Write the numbers of plans, and how many ops are on another stage than in the first, as JSON."""
    found: list[dict[str, Any]] = []
    first = plans[0][0]
    for name, (plan, run) in zip(names, plans):
        same = plan.fingerprint == first.fingerprint
        stages, metrics = first.stage_of, metrics_of(plan, plan.predicted, run)
        values = {key: m.value if math.isfinite(m.value) else None for key, m in metrics.items()}
        moved = sum(stages[op.name] != op.stage for op in plan.ops) if same else None
        found.append({"plan": name, "schedule": plan.schedule, "metrics": values, "moved_ops": moved})
    return json.dumps(found, indent=1) + "\n"
