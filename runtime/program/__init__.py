"""Programs: a schedule lowered to instructions per worker, checked, and put on a time axis."""

from .check import check
from .lower import Program, lower
from .specs import InputLeaf, InputSpec, NodeRecord, NodeRef, OutputLeaf, PipelineSpec, StageSpec, WireGroup
from .timeline import Span, Timeline
from .trace import chrome_trace

__all__ = [
    "InputLeaf",
    "InputSpec",
    "NodeRecord",
    "NodeRef",
    "OutputLeaf",
    "PipelineSpec",
    "Program",
    "Span",
    "StageSpec",
    "Timeline",
    "WireGroup",
    "check",
    "chrome_trace",
    "lower",
]
