"""Where a call was made: the line of the model's code, and the settings that it runs under."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_NOT_THE_MODEL = (
    _PACKAGE,
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.__file__) + os.sep + "contextlib",
    "<",
)


def is_of_the_model(file: str) -> bool:
    """Say whether code in ``file`` is neither torch's nor this package's."""
    return not file.startswith(_NOT_THE_MODEL)


def settings() -> tuple[Any, ...]:
    """Read what a ``with`` block can set, and a graph does not express."""
    cuda = torch.backends.cuda
    return (
        torch._C._autograd._top_saved_tensors_default_hooks(False) is None,
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        cuda.matmul.allow_tf32,
    )


def calling_frame() -> types.FrameType | None:
    """Find the innermost frame of the model's own code."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_MODEL):
        frame = frame.f_back
    return frame


def asking_frame() -> types.FrameType:
    """Find the frame that called the torch function which is being recorded: torch's own code too."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_code.co_filename.startswith(_PACKAGE) or _is_passing_on(frame)):
        frame = frame.f_back
    return frame


def place_of_call() -> tuple[int, int]:
    """Name the very instruction that called the torch function which is being recorded."""
    frame = asking_frame()
    return id(frame), frame.f_lasti


def _is_passing_on(frame: types.FrameType) -> bool:
    return frame.f_code.co_filename in (torch.overrides.__file__, torch._tensor.__file__)


def line() -> str | None:
    """Find the innermost line of the model's own code."""
    frame = calling_frame()
    return None if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def line_of(error: BaseException) -> str | None:
    found = None
    trace = error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_NOT_THE_MODEL):
            found = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
