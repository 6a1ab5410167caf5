"""What was measured beside what was predicted: stages and the step, as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..partitioner.measured_run import MeasuredRun
from ..runtime.program import Timeline
from ..runtime.program.timeline import COMPUTE_NAMES
from .tables import Table
from .words import clean, count, duration, share


@dataclass(frozen=True)
class Comparison:
    """Seconds of a stage's computations of one microbatch, or of a step (``stage`` is None): the median and the spread.

    ``predicted_s`` is None for what the prediction does not have.
    """

    what: str
    stage: int | None
    predicted_s: float | None
    measured_s: float
    least_s: float
    most_s: float

    @property
    def ratio(self) -> float | None:
        """Return measured over predicted; None where nothing was predicted."""
        return self.measured_s / self.predicted_s if self.predicted_s else None


def comparisons(run: MeasuredRun, predicted: Timeline) -> list[Comparison]:
    """List what each stage took for a microbatch against its spans in the simulated step, and then the step."""
    expected, found = _seconds(predicted), _seconds(run.timeline)
    stages = [
        Comparison(
            COMPUTE_NAMES[op],
            stage,
            statistics.median(expected[stage, op]) if (stage, op) in expected else None,
            statistics.median(found[stage, op]),
            min(found[stage, op]),
            max(found[stage, op]),
        )
        for stage in range(len(run.plan.stages))
        for op in COMPUTE_NAMES
        if (stage, op) in found
    ]
    step_s = run.plan.prediction.step_s
    return [*stages, Comparison("step", None, step_s, run.step_s, min(run.steps_s), max(run.steps_s))]


def _seconds(timeline: Timeline) -> dict[tuple[int, str], list[float]]:
    spans: dict[tuple[int, str], list[float]] = {}
    for span in timeline.spans:
        if span.op in COMPUTE_NAMES:
            spans.setdefault((span.stage, span.op), []).append(span.end_s - span.start_s)
    return spans


def measured_table(found: Sequence[Comparison]) -> Table:
    """List predicted and measured seconds, with the least and the most measured."""
    rows = tuple(
        (
            "step" if one.stage is None else f"stage {one.stage} {one.what}",
            "-" if one.predicted_s is None else duration(one.predicted_s),
            duration(one.measured_s),
            f"{duration(one.least_s)} to {duration(one.most_s)}",
            "-" if one.ratio is None else f"{one.ratio:.2f}",
        )
        for one in found
    )
    header = ("", "predicted", "measured", "spread", "measured / predicted")
    return Table(header, (False, True, True, True, True), rows, "nothing was measured")


def measured_title(run: MeasuredRun) -> str:
    """Say what the rows of the table are medians of, and what computed."""
    steps, threads = count(len(run.steps_s), "step"), count(run.n_threads, "thread")
    medians = f"medians of microbatches and of {steps}"
    return f"predicted against measured, {medians}; torch {clean(run.torch)}, {threads} a worker"


def measured_step(run: MeasuredRun) -> str:
    """Head the grid of the measured step."""
    return f"measured step, the median one, bubble {share(run.timeline.bubble)}"


def measured_json(run: MeasuredRun, predicted: Timeline) -> str:
    """Write the numbers of the table as JSON; seconds."""
    *stages, step = [_record(one) for one in comparisons(run, predicted)]
    record = {
        "model": run.plan.model,
        "schedule": run.plan.schedule,
        "microbatches": run.plan.n_microbatches,
        "torch": run.torch,
        "threads": run.n_threads,
        "bubble": {"predicted": run.plan.prediction.bubble, "measured": run.timeline.bubble},
        "step": step | {"steps_s": run.steps_s},
        "stages": stages,
    }
    return json.dumps(record, indent=1) + "\n"


def _record(one: Comparison) -> dict[str, Any]:
    place = {} if one.stage is None else {"stage": one.stage, "what": one.what}
    seconds = {"predicted_s": one.predicted_s, "measured_s": one.measured_s}
    return {**place, **seconds, "least_s": one.least_s, "most_s": one.most_s, "ratio": one.ratio}
