"""The check that every capture runs on itself: graph and model, on a few rows, from equal seeds."""

from __future__ import annotations

import random
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CaptureError
from ..structure import call_leaves, flatten, map_leaves, tensors_in, unflatten
from .captured import Capture
from .flops import ModuleFlops, meta_like
from .recording.kept import catching
from .recording.state import put_back
from .recording.tensors import ModelState

_CHECK_ROWS = 2


def agrees(result: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Run model and graph once on a few rows, from equal seeds and equal buffers, and compare the results.

    A model without data (on the meta device) or that is kept whole has nothing to compare.

    Raises:
        CaptureError: the model fails on the example.
    """
    if result.is_whole:
        return True
    tensors = tensors_in((args, kwargs)) + list(result.model.parameters())
    if any(tensor.is_meta for tensor in tensors):
        return True
    for rows in (_CHECK_ROWS, None) if result.inputs.rows is None else (None,):
        try:
            expected = _run(result, result.model, args, kwargs, rows)
        except Exception:
            continue
        try:
            given = _run(result, result.module, args, kwargs, rows)
        except Exception:
            return False
        return close(expected, given)
    raise CaptureError(
        f"{type(result.model).__name__} fails on the example inputs by itself, before anything is cut",
        hint="call model(*example_inputs) to see the error",
    )


def forward_flops(result: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """Count the FLOPs of one forward of the model on a few rows: of the whole by the name ``""``, and of each opaque
    module or function. Empty if nothing is opaque, or if the model cannot be run so."""
    if not result.opaque or result.is_whole:
        return {}
    names = {result.model.get_submodule(call.path): call.path for call in result.opaque if call.function is None}
    meta = any(tensor.is_meta for tensor in tensors_in((args, kwargs)) + list(result.model.parameters()))
    if meta:
        args, kwargs = map_leaves(
            lambda leaf: meta_like(leaf) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
        )
    for rows in (_CHECK_ROWS, None) if result.inputs.rows is None else (None,):
        counter = ModuleFlops(names)
        with (
            suppress(Exception),
            torch.device("meta") if meta else nullcontext(),
            counter.counting(),
            ExitStack() as stack,
        ):
            for call in result.opaque:
                if call.function is not None:
                    stack.enter_context(catching(call.function, partial(counter.call, call.name)))
            _run(result, result.model, args, kwargs, rows)
            return {"": counter.total, **counter.of}
    return {}


def _alike(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Copy an argument, or its first rows; gradients stop there, and are wanted there, as the caller's."""
    return value.detach().clone().requires_grad_(like.requires_grad)


def _run(result: Capture, module: nn.Module, args: Any, kwargs: Any, rows: int | None) -> Any:
    leaves, structure = call_leaves(result.model.forward, args, kwargs)
    leaves = [
        _alike(leaf[:rows] if known.batched else leaf, leaf) if known.graph_input else leaf
        for known, leaf in zip(result.inputs.leaves, leaves)
    ]
    few_args, few_kwargs = unflatten(structure, leaves)
    state = ModelState(result.model).tensors.values()
    parameters = result.sets_itself_up  # a first call may write to any of them
    mutable = [t for name, t in state if parameters or not isinstance(t, nn.Parameter) or name in result.written]
    kept = [(tensor, tensor.detach().clone()) for tensor in mutable]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        with torch.enable_grad(), put_back(result.model):
            given = module(*few_args, **few_kwargs)
            return map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, given)
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


def close(expected: Any, given: Any) -> bool:
    """Say whether two results have the same structure and, within rounding, the same values."""
    ours, structure = flatten(expected)
    theirs, other = flatten(given)
    return structure == other and all(_close_leaf(a, b) for a, b in zip(ours, theirs))


def _close_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
    return a is b or (type(a) is type(b) and bool(a == b))
