"""stagecut: compile any PyTorch module into an exact, pipelined, replicated training program.

>>> import torch, stagecut
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> plan = stagecut.plan(model, ["cpu", "cpu"], example_inputs=(torch.randn(8, 4),), costs="analytic")
>>> len(plan.stages)
2
"""

from .api import compile, plan
from .errors import (
    CaptureError,
    CheckpointError,
    ConstraintError,
    DeviceError,
    InfeasibleError,
    PlanError,
    ShapeError,
    StagecutError,
    StageError,
    StallError,
    WorkerLost,
)
from .partitioner.capture import Capture, capture
from .partitioner.plan import Plan, load
from .runtime.pipeline import EvalResult, Pipeline, Profile, StepResult
from .runtime.program import Timeline
from .runtime.verify import VerifyReport

__version__ = "0.1.0"

__all__ = [
    "Capture",
    "CaptureError",
    "CheckpointError",
    "ConstraintError",
    "DeviceError",
    "EvalResult",
    "InfeasibleError",
    "Pipeline",
    "Plan",
    "PlanError",
    "Profile",
    "ShapeError",
    "StageError",
    "StagecutError",
    "StallError",
    "StepResult",
    "Timeline",
    "VerifyReport",
    "WorkerLost",
    "capture",
    "compile",
    "load",
    "plan",
]
