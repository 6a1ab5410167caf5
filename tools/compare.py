"""The subcommand ``partition-viz compare``: plans beside each other."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import StagecutError
from ..partitioner.plan import Plan
from .metrics import COUNT, SHARE, Metric, metrics_of
from .tables import Table
from .words import clean, count

_LISTED = 12


def check_count(paths: Sequence[Path]) -> None:
    """Refuse a single plan.

    Raises:
        StagecutError: there is nothing to compare it with.
    """
    if len(paths) < 2:
        raise StagecutError("compare takes two plans or more", hint="partition-viz show PLAN.json for one")


def numbers_table(names: Sequence[str], plans: Sequence[Plan]) -> Table:
    """List the numbers of plans, with what each is of the first plan's."""
    every = [metrics_of(plan, plan.predicted) for plan in plans]
    rows = [
        (name, *(_cell(found[name], every[0][name], index) for index, found in enumerate(every))) for name in every[0]
    ]
    orders = ("schedule", *(clean(plan.schedule) for plan in plans))
    header = ("", *(clean(name) for name in names))
    return Table(header, (False, *(True for _ in plans)), (orders, *rows), "")


def _cell(metric: Metric, first: Metric, index: int) -> str:
    if index == 0 or not (math.isfinite(metric.value) and math.isfinite(first.value)):
        return str(metric)
    if metric.value == first.value:
        return f"{metric} (=)"
    if metric.kind == COUNT:
        return str(metric)
    if metric.kind == SHARE:
        return f"{metric} ({(metric.value - first.value) * 100:+.0f} points)"
    return f"{metric} ({metric.value / first.value - 1:+.0%})" if first.value else str(metric)


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


def record(names: Sequence[str], plans: Sequence[Plan]) -> str:
    """Write the numbers of plans, and how many ops are on another stage than in the first, as JSON."""
    found: list[dict[str, Any]] = []
    for name, plan in zip(names, plans):
        same = plan.fingerprint == plans[0].fingerprint
        stages = plans[0].stage_of
        values = {
            key: m.value if math.isfinite(m.value) else None for key, m in metrics_of(plan, plan.predicted).items()
        }
        moved = sum(stages[op.name] != op.stage for op in plan.ops) if same else None
        found.append({"plan": name, "schedule": plan.schedule, "metrics": values, "moved_ops": moved})
    return json.dumps(found, indent=1) + "\n"
