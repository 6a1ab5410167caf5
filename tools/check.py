"""The subcommand ``partition-viz check``: hold a plan against limits, for continuous integration."""

from __future__ import annotations

import json
import math
from typing import Any

from ..partitioner.measured_run import MeasuredRun
from ..partitioner.plan import Plan
from .metrics import Gate, Metric, gates, metrics_of

_ALWAYS = "filled>1"


def check_text(plan: Plan, fail_on: str, run: MeasuredRun | None = None, *, as_json: bool) -> tuple[str, bool]:
    """Return what is to be printed, and whether the plan, or the ``run`` of it, is good enough.

    Raises:
        StagecutError: the conditions cannot be read.
    """
    metrics = metrics_of(plan, plan.predicted, run)
    asked = gates(fail_on, metrics) + gates(_ALWAYS, metrics)
    tripped = [gate for gate in asked if gate.trips(metrics[gate.name])]
    text = _record(metrics, asked, tripped) if as_json else _lines(metrics, asked, tripped)
    return text, not tripped


def _record(metrics: dict[str, Metric], asked: list[Gate], tripped: list[Gate]) -> str:
    record: dict[str, Any] = {
        "ok": not tripped,
        "metrics": {
            name: {"value": m.value if math.isfinite(m.value) else None, "kind": m.kind} for name, m in metrics.items()
        },
        "conditions": [{"condition": gate.text, "limit": gate.limit, "holds": gate in tripped} for gate in asked],
    }
    return json.dumps(record, indent=1) + "\n"


def _lines(metrics: dict[str, Metric], asked: list[Gate], tripped: list[Gate]) -> str:
    width = max(map(len, metrics))
    lines = [f"{name:<{width}}  {metric!s:>10}  {metric.meaning}".rstrip() for name, metric in metrics.items()]
    lines += [
        f"{'FAILED' if gate in tripped else 'passed'}: {gate.text} ({gate.name} is {metrics[gate.name]})"
        for gate in asked
    ]
    return "\n".join(lines) + "\n"
