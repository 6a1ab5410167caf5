"""stagecut: compile any PyTorch module into an exact, pipelined, replicated training program.

>>> import torch, stagecut
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> x = torch.randn(8, 4)
>>> plan = stagecut.plan(model, ["cpu", "cpu"], example_inputs=(x,), stages=2, costs="analytic")
>>> len(plan.stages)
2
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import compile, plan
    from .errors import (
        CaptureError,
        CheckpointError,
        ConstraintError,
        DeviceError,
        InfeasibleError,
        NonFiniteError,
        OutOfMemoryError,
        PlanError,
        ShapeError,
        StagecutError,
        StageError,
        StallError,
        WorkerLost,
    )
    from .loading import load
    from .partitioner.capture import Capture, OpaqueCall, capture
    from .partitioner.hidden import Hidden
    from .partitioner.plan import Plan
    from .partitioner.verification import CaptureCheck
    from .runtime.launch import end_workers
    from .runtime.pipeline import Pipeline
    from .runtime.program import Timeline
    from .runtime.results import EvalResult, Profile, Startup, StepResult
    from .runtime.verify import VerifyReport
    from .runtime.watch.stats import Stats, WorkerStats

__version__ = "0.1.0"

__all__ = [
    "Capture",
    "CaptureCheck",
    "CaptureError",
    "CheckpointError",
    "ConstraintError",
    "DeviceError",
    "EvalResult",
    "Hidden",
    "InfeasibleError",
    "NonFiniteError",
    "OpaqueCall",
    "OutOfMemoryError",
    "Pipeline",
    "Plan",
    "PlanError",
    "Profile",
    "ShapeError",
    "StageError",
    "StagecutError",
    "StallError",
    "Startup",
    "Stats",
    "StepResult",
    "Timeline",
    "VerifyReport",
    "WorkerLost",
    "WorkerStats",
    "capture",
    "compile",
    "end_workers",
    "load",
    "plan",
]

# Where each name lives. Names are loaded at first use, so that a worker process, which needs only the runtime, does not
# spend a second on importing the partitioner and what it stands on.
_HOMES = {
    "api": ("compile", "plan"),
    "partitioner.capture": ("Capture", "OpaqueCall", "capture"),
    "partitioner.hidden": ("Hidden",),
    "loading": ("load",),
    "partitioner.plan": ("Plan",),
    "partitioner.verification": ("CaptureCheck",),
    "runtime.launch": ("end_workers",),
    "runtime.pipeline": ("Pipeline",),
    "runtime.program": ("Timeline",),
    "runtime.results": ("EvalResult", "Profile", "Startup", "StepResult"),
    "runtime.verify": ("VerifyReport",),
    "runtime.watch.stats": ("Stats", "WorkerStats"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name, "errors" if name in __all__ else None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
