"""What a pipeline notes of its own run: counts, values that are not finite, slow workers, and steps that failed."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import NonFiniteError
from ...records import from_json, to_json
from ..program import PipelineSpec
from ..requests import TRAIN, StepReport, StepRequest
from . import bundle
from .finding import BOUNDARIES, LOSS, WARN, NonFinite, error_of, first_of
from .logs import STEPS, WORKERS
from .slow import SlowWorkers
from .stats import Stats, Tally, WorkerStats

if TYPE_CHECKING:
    from ..engine import Engine

_LEVELS = {TRAIN: 5}  # of the caller of pm.step, above a warning from here
_LEVEL = 4  # of the caller of anything else
_REPLAN = {
    True: "pm.replan(x, target=y) plans again with what is measured",
    False: "pm.save(...), start again and pm.load(...): stagecut.compile plans anew",
}


class Watch:
    """Hears of every call of one pipeline, after it was carried out or failed."""

    def __init__(self, check_finite: str | None = None, on_nonfinite: str = "error", launch: str = "local") -> None:
        self.check_finite = check_finite
        self.launch = launch
        self._warns = on_nonfinite == WARN
        self._n_restarts = 0
        self._tally = Tally()
        self._slow: SlowWorkers | None = None
        self._spec: PipelineSpec | None = None
        self._plan: Any = None
        self._was_bad = False

    def planned(self, spec: PipelineSpec, plan: Any) -> None:
        """Start counting anew, if it is another plan than the one that ran before."""
        if plan is self._plan and spec is self._spec:
            return
        self._spec, self._plan = spec, plan
        self._tally = Tally(spec.devices, plan.prediction.step_s)
        self._slow = SlowWorkers(lambda: plan.predicted)

    def restarted(self) -> None:
        """Count that workers are started again after an error."""
        self._n_restarts += 1
        WORKERS.info("started again after an error, for the %d. time", self._n_restarts)

    def ran(self, request: StepRequest, report: StepReport, seconds: float, engine: Engine) -> None:
        """Take note of a call that was carried out.

        Raises:
            NonFiniteError: ``check_finite`` found something, and it is to be an error.
        """
        STEPS.debug("%s %d done in %.1f ms", request.kind, request.call, seconds * 1e3)
        self._tally.add(request, report, seconds)
        self._n_restarts += report.n_restarts
        if self._slow is not None and request.kind == TRAIN:
            figures = self._slow.look(report.busy_s, request.n_microbatches, seconds)
            if figures is not None:
                STEPS.warning("%s", figures)
                if self._speaks(report):
                    proposal = _REPLAN[self.launch != "torchrun"]
                    warnings.warn(f"stagecut: {figures}\n  try: {proposal}", stacklevel=_LEVELS[TRAIN])
        if self.check_finite is None or self._spec is None:
            return
        error = self._nonfinite(self._spec, request, report)
        if error is not None and not self._warns:
            self.failed(error, request, engine)
            raise error
        if error is not None and not self._was_bad and self._speaks(report):
            once = "this is not said again until a call is finite"
            warnings.warn(f"stagecut: {error.message} ({once})", stacklevel=_LEVELS.get(request.kind, _LEVEL))
        self._was_bad = error is not None

    def _speaks(self, report: StepReport) -> bool:
        """Say whether this process is the one of several that know the same."""
        return self.launch != "torchrun" or 0 in report.counts

    def _nonfinite(self, spec: PipelineSpec, request: StepRequest, report: StepReport) -> NonFiniteError | None:
        """Return the error for the first value that is not finite, if there is one."""
        located = self.check_finite == BOUNDARIES
        last = spec.layout.n_stages - 1
        found = (
            report.nonfinite
            if located
            else first_of(
                NonFinite(last, m, LOSS, "loss", "", "NaN" if math.isnan(value) else "infinity")
                for m, value in ((m, loss.item()) for m, loss in report.losses.items())
                if request.weights[m] != 0 and not math.isfinite(value)
            )
        )
        if found is None:
            return None
        self._tally.n_nonfinite += 1
        if self._warns:
            STEPS.warning("%s %d: %s", request.kind, request.call, found)
        return error_of(found, spec.layout.worker_of(found.stage, found.microbatch), located=located)

    def failed(self, error: Exception, request: StepRequest, engine: Engine) -> None:
        """Take note of a call that failed, before its engine is closed."""
        first_line = bundle.text_of(error).partition("\n")[0]
        STEPS.error("%s %d failed: %s: %s", request.kind, request.call, type(error).__name__, first_line)
        bundle.keep(error, lambda: self._scene(request, engine))

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """Take note if workers cannot be started or be given their stages."""
        try:
            yield
        except Exception as error:
            first_line = bundle.text_of(error).partition("\n")[0]
            WORKERS.error("not set up: %s: %s", type(error).__name__, first_line)
            bundle.keep(error, lambda: self._scene(None, None))
            raise

    def _scene(self, request: StepRequest | None, engine: Engine | None) -> bundle.Scene:
        program = engine.program_of(request).workers if request is not None and engine is not None else ()
        return bundle.Scene(
            request=request,
            plan=self._plan,
            devices=() if self._spec is None else self._spec.devices,
            n_threads=None if engine is None else engine.n_threads,
            launch=self.launch,
            program=program,
            positions={} if engine is None else engine.positions(),
            stats=self.local_stats(engine),
        )

    def local_stats(self, engine: Engine | None) -> Stats:
        """Return what this process knows, without asking others."""
        return self._tally.stats(self._tally.rows({} if engine is None else engine.residents()), self._n_restarts)

    def stats(self, engine: Engine | None) -> Stats:
        """Return what all processes know; under torchrun all ranks call it."""
        if engine is None:
            return self.local_stats(None)
        own = self._tally.rows(engine.residents())
        texts = engine.gathered(json.dumps(to_json(own)))
        rows = [from_json(WorkerStats, row) for text in texts for row in json.loads(text)]
        return self._tally.stats(rows, self._n_restarts)
