"""A measured run as a record: the plan that ran, what every worker did in a step, and how long each step took."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import PlanError
from ..records import from_json, read_file, to_json
from ..runtime.instructions import COMPUTE, WHOLE_BATCH, Op
from ..runtime.program import Span, Timeline
from .plan import Plan, parse

RUN_FORMAT = 1
_KNOWN = frozenset(op.value for op in Op)


@dataclass(frozen=True)
class MeasuredRun:
    """Steps of a plan, measured.

    Attributes:
        format: version of this record.
        plan: what ran.
        timeline: what every worker did in the median step.
        steps_s: wall seconds of every measured step, in their order.
        torch: version of torch that computed.
        n_threads: CPU threads that each worker computed with.
    """

    format: int
    plan: Plan
    timeline: Timeline
    steps_s: tuple[float, ...]
    torch: str
    n_threads: int

    @property
    def step_s(self) -> float:
        """Return the median wall seconds of a step."""
        return statistics.median(self.steps_s)

    def save(self, path: str | Path) -> None:
        """Write the run as JSON."""
        Path(path).write_text(json.dumps(to_json(self), indent=1) + "\n", encoding="utf-8")


def measured_run(plan: Plan, timeline: Timeline, steps_s: Sequence[float]) -> MeasuredRun:
    """Record what ``pm.profile(...)`` of a pipeline with ``plan`` measured in this process."""
    return MeasuredRun(RUN_FORMAT, plan, timeline, tuple(steps_s), str(torch.__version__), plan.n_threads)


def read_run(path: str | Path) -> MeasuredRun:
    """Read a run and validate it.

    Raises:
        PlanError: the file is no JSON, a key is unknown or missing, a type is wrong, or the timeline is none of the
            plan's; the message names the place in the file.
    """
    return read_file(path, parse_run)


def read_plan(path: str | Path) -> tuple[Plan, MeasuredRun | None]:
    """Read a file that holds a plan or a run: the plan, and the run if it is one.

    Raises:
        PlanError: see :func:`read_run`.
    """
    return read_file(path, _either)


def _either(value: Any) -> tuple[Plan, MeasuredRun | None]:
    if isinstance(value, dict) and "plan" in value:
        run = parse_run(value)
        return run.plan, run
    if isinstance(value, dict) and "nodes" in value and "format" not in value:
        raise PlanError("$: this is a cost graph and no plan", hint="partition-viz solve graph.json cuts it")
    return parse(value), None


def parse_run(value: Any) -> MeasuredRun:
    """Build a run from plain JSON values and validate it (see :func:`read_run`)."""
    if isinstance(value, dict) and value.get("format") != RUN_FORMAT:
        raise PlanError(f"$.format: this version reads format {RUN_FORMAT} of runs, got {value.get('format')!r}")
    if isinstance(value, dict) and "plan" in value:
        _check_plan(value["plan"])
    run = from_json(MeasuredRun, value)
    _validate(run)
    return run


def _check_plan(value: Any) -> None:
    """Refuse what is no plan, with its place in the run."""
    try:
        parse(value)
    except PlanError as error:
        inside = error.message.startswith("$")
        place = f"$.plan{error.message[1:]}" if inside else f"$.plan: {error.message}"
        raise PlanError(place, hint=error.hint) from error


def _validate(run: MeasuredRun) -> None:
    if not run.steps_s:
        raise PlanError("$.steps_s: a run has at least one step")
    for index, seconds in enumerate(run.steps_s):
        if seconds <= 0:
            raise PlanError(f"$.steps_s[{index}]: expected seconds above 0, got {seconds}")
    if run.n_threads < 1:
        raise PlanError(f"$.n_threads: expected at least 1, got {run.n_threads}")
    if run.timeline.source != "measured":
        raise PlanError(f"$.timeline.source: expected 'measured', got {run.timeline.source!r}")
    n_workers = len(run.plan.devices)
    if run.timeline.n_workers != n_workers:
        raise PlanError(f"$.timeline.n_workers: the plan has {n_workers} workers, got {run.timeline.n_workers}")
    _validate_spans(run.plan, run.timeline.spans)


def _validate_spans(plan: Plan, spans: Sequence[Span]) -> None:
    """Every instruction is of a stage and a microbatch of the plan, on the worker that they belong to."""
    layout = plan.layout()
    n_microbatches = plan.n_microbatches * layout.n_replicas
    computed: set[tuple[str, int, int]] = set()
    for index, span in enumerate(spans):
        path = f"$.timeline.spans[{index}]"
        if span.op not in _KNOWN:
            raise PlanError(f"{path}.op: expected one of {', '.join(sorted(_KNOWN))}, got {span.op!r}")
        if not 0 <= span.stage < layout.n_stages:
            raise PlanError(f"{path}.stage: there are {layout.n_stages} stages, got {span.stage}")
        least = 0 if span.op in COMPUTE else WHOLE_BATCH
        if not least <= span.microbatch < n_microbatches:
            raise PlanError(f"{path}.microbatch: there are {n_microbatches} microbatches, got {span.microbatch}")
        of_all = span.microbatch == WHOLE_BATCH
        owners = layout.workers[span.stage] if of_all else (layout.worker_of(span.stage, span.microbatch),)
        if span.worker not in owners:
            raise PlanError(f"{path}.worker: expected {' or '.join(map(str, owners))}, got {span.worker}")
        if not 0 <= span.start_s <= span.end_s:
            raise PlanError(f"{path}: expected 0 <= start_s <= end_s, got {span.start_s} and {span.end_s}")
        action = (span.op, span.stage, span.microbatch)
        if action in computed:
            raise PlanError(f"{path}: {span.op}{span.stage}.{span.microbatch} is there twice")
        if span.op in COMPUTE:
            computed.add(action)
    idle = set(range(layout.n_stages)) - {stage for op, stage, _ in computed if op == Op.FORWARD}
    if idle:
        raise PlanError(f"$.timeline.spans: stage {min(idle)} computes no forward")
