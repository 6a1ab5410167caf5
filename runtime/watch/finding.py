"""A value that is not finite: where it came up, as data, and as the error or warning that says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import FailureSite, NonFiniteError

LOSS, BOUNDARIES = "loss", "boundaries"
CHECKS = (LOSS, BOUNDARIES)
ERROR, WARN = "error", "warn"
ACTIONS = (ERROR, WARN)
INPUT, FORWARD, BACKWARD = "input", "forward", "backward"


@dataclass(frozen=True)
class NonFinite:
    """The first value that is not finite, on its way through the stages.

    Attributes:
        stage: the stage that made it (``input``: that was given it by the caller).
        microbatch: counted over all replicas.
        phase: ``"forward"`` (a value that leaves the stage), ``"loss"``, ``"backward"`` (a gradient that leaves it), or
            ``"input"`` (part of the batch itself).
        value: the op that made the value, the value whose gradient it is, or the name of the input.
        module_path: the module of the user's model that the op belongs to.
        kind: ``"NaN"`` or ``"infinity"``.
    """

    stage: int
    microbatch: int
    phase: str
    value: str
    module_path: str
    kind: str

    @property
    def order(self) -> tuple[bool, int, int]:
        """Sort by the way that values take: forwards, then backwards, each by microbatch and stage."""
        backward = self.phase == BACKWARD
        return backward, self.microbatch, -self.stage if backward else self.stage

    def __str__(self) -> str:
        path = f" (module {self.module_path})" if self.module_path else ""
        where = f"of microbatch {self.microbatch}"
        if self.phase == INPUT:
            return f"{self.kind} in the batch: {self.value!r} {where}, given to stage {self.stage}"
        if self.phase == LOSS:
            return f"{self.kind} in the loss {where}, in stage {self.stage}"
        what = "gradient of value" if self.phase == BACKWARD else "value"
        return f"{self.kind} in the {self.phase} {where} in stage {self.stage}: {what} {self.value!r}{path}"


def first_of(findings: Iterable[NonFinite | None]) -> NonFinite | None:
    """Return the one from which the others come.

    A stage's own number says whether a value came to it that way: values go from lower stages to higher ones, and
    gradients back. So the lowest stage of a forward (the highest of a backward) was given finite values.
    """
    return min((found for found in findings if found is not None), key=lambda found: found.order, default=None)


def error_of(found: NonFinite, worker: int, *, located: bool) -> NonFiniteError:
    """Make the error; ``located`` says that boundaries were looked at, so that the stage is the first bad one."""
    drop = "pm.zero_grad() drops this step's gradients, and the pipeline goes on"
    error = NonFiniteError(
        f"{found}; gradients of this step are not to be used",
        hint=drop if located else f"check_finite='boundaries' names the first stage that makes it; {drop}",
    )
    error.stage, error.microbatch, error.phase = found.stage, found.microbatch, found.phase
    error.value, error.module_path = found.value, found.module_path
    place = f"the {found.phase} of stage {found.stage}"
    error.stagecut = FailureSite(worker, found.stage, found.microbatch, place, found.module_path or None)
    return error
