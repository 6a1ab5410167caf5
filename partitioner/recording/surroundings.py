"""Where a call was made: the line of the model's code, and the settings that it runs under."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

_NOT_THE_MODEL = (
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.__file__) + os.sep + "contextlib",
    "<",
)


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
        torch.backends.cudnn.enabled,
        cuda.matmul.allow_tf32,
    )


def line() -> str | None:
    """Find the innermost line of the model's own code."""
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_NOT_THE_MODEL):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def line_of(error: BaseException) -> str | None:
    found = None
    trace = error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_NOT_THE_MODEL):
            found = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
