"""The numbers of a plan that one may want to hold a limit against, or compare."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import StagecutError
from ..partitioner.measured_run import MeasuredRun
from ..partitioner.plan import Plan
from ..runtime.program import Timeline
from .verdict import idle_s, sent_to, slowest_stage, stage_load_s
from .words import NO_LIMIT, duration, share, size

SECONDS, BYTES, SHARE, NUMBER, COUNT = "seconds", "bytes", "share", "number", "count"
_UNITS: dict[str, dict[str, float]] = {
    SECONDS: {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    BYTES: {"B": 1.0, **{f"{p}iB": 1024.0**n for n, p in enumerate("KMGT", 1)},
            "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12},
    SHARE: {"": 1.0, "%": 0.01},
    NUMBER: {"": 1.0},
    COUNT: {"": 1.0},
}  # fmt: skip
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda value, limit: value >= limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    "<": lambda value, limit: value < limit,
}
_GATE = re.compile(r"\s*([a-z_]+)\s*(>=|<=|>|<)\s*([0-9][0-9.eE+-]*)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True)
class Metric:
    """One number of a plan: its kind is ``seconds``, ``bytes``, ``share`` (of 1), ``number`` or ``count``."""

    name: str
    value: float
    kind: str
    meaning: str

    def __str__(self) -> str:
        if self.kind == SECONDS:
            return duration(self.value)
        if self.kind == BYTES:
            return size(self.value)
        return share(self.value) if self.kind == SHARE else f"{self.value:.4g}"


@dataclass(frozen=True)
class Gate:
    """A condition under which a plan is not good enough: ``bubble>0.25``."""

    text: str
    name: str
    relation: str
    limit: float

    def trips(self, metric: Metric) -> bool:
        """Say whether the condition holds."""
        return _COMPARE[self.relation](metric.value, self.limit)


def metrics_of(plan: Plan, timeline: Timeline, run: MeasuredRun | None = None) -> dict[str, Metric]:
    """Return the numbers of a plan, by name, and those of a ``run`` of it."""
    p, loads = plan.prediction, [stage_load_s(stage) for stage in plan.stages]
    mean, makespan = sum(loads) / len(loads), timeline.makespan_s
    idle = [idle_s(timeline, worker) for worker in range(timeline.n_workers)]
    fullest = max((s.device_bytes / s.memory_limit_bytes for s in plan.stages if 0 < s.memory_limit_bytes < NO_LIMIT),
                  default=0.0)  # fmt: skip
    found = [
        Metric("step", p.step_s, SECONDS, "predicted step"),
        Metric("bubble", p.bubble, SHARE, "workers' time without compute"),
        Metric("waiting", max(idle) / makespan if makespan > 0 else 0.0, SHARE, "of the step, of who waits longest"),
        Metric("imbalance", stage_load_s(slowest_stage(plan)) / mean if mean else 1.0, NUMBER, "slowest stage / mean"),
        Metric("gap", _gap(plan), SHARE, "bottleneck above its proven lower bound"),
        Metric("speedup", p.one_device_s / p.step_s if p.step_s > 0 else 1.0, NUMBER, "one device's step / this one"),
        Metric("crossing", sum(w.n_bytes * len(sent_to(plan, w)) for w in plan.wires), BYTES, "forward, a microbatch"),
        Metric("memory", max(s.device_bytes for s in plan.stages), BYTES, "of the fullest device"),
        Metric("filled", fullest, SHARE, "of its limit, of the fullest device; 0 without a limit"),
        Metric("stages", len(plan.stages), COUNT, ""),
        Metric("workers", len(plan.devices), COUNT, ""),
        Metric("microbatches", plan.n_microbatches, COUNT, "of each replica"),
    ]
    return {metric.name: metric for metric in (*found, *_measured(run))}


def _measured(run: MeasuredRun | None) -> list[Metric]:
    if run is None:
        return []
    step_s = run.plan.prediction.step_s
    return [
        Metric("measured", run.step_s, SECONDS, "measured step, the median"),
        Metric("measured_bubble", run.timeline.bubble, SHARE, "workers' time without compute, in the median step"),
        Metric("slower", run.step_s / step_s if step_s > 0 else float("inf"), NUMBER, "measured step / predicted"),
    ]


def _gap(plan: Plan) -> float:
    p = plan.prediction
    if p.optimal:
        return 0.0
    return p.bottleneck_s / p.lower_bound_s - 1 if p.lower_bound_s > 0 else float("inf")


def gates(text: str, metrics: dict[str, Metric]) -> list[Gate]:
    """Read conditions that are separated by commas.

    Raises:
        StagecutError: one is no condition, of a number that is not there, or in a unit that does not belong to it.
    """
    return [_gate(part, metrics) for part in text.split(",") if part.strip()]


def _gate(part: str, metrics: dict[str, Metric]) -> Gate:
    match = _GATE.fullmatch(part)
    if match is None:
        raise StagecutError(f"{part.strip()!r} is no condition", hint="NAME>LIMIT, such as bubble>0.25 or step>=200ms")
    name, relation, number, unit = match.groups()
    if name not in metrics:
        raise StagecutError(f"{part.strip()!r}: there is no {name!r}", hint=f"one of {', '.join(metrics)}")
    units = _UNITS[metrics[name].kind]
    if unit not in units:
        known = " or ".join(filter(None, units)) or "no unit"
        raise StagecutError(f"{part.strip()!r}: {name} is a number of {metrics[name].kind}", hint=f"with {known}")
    try:
        limit = float(number) * units[unit]
    except ValueError as error:
        raise StagecutError(f"{part.strip()!r}: {number!r} is no number") from error
    return Gate(part.strip(), name, relation, limit)
