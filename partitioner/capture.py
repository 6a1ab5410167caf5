"""Capture: any ``nn.Module`` becomes a torch.fx graph; what cannot be followed becomes one opaque call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError
from ..runtime.program import InputSpec
from ..structure import call_leaves, leaf_paths
from .arguments import input_spec
from .captured import Capture, OpaqueCall
from .ladder import Ladder, matching_paths
from .recording.state import caches_found_once, own_random_state, put_back
from .selfcheck import agrees, forward_flops


def capture(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, opaque: Sequence[str] = ()
) -> Capture:
    """Capture ``model`` as it is called with ``args`` and ``kwargs``.

    The model's forward runs on stand-ins for tensors, in training and in evaluation, for several batch sizes, and every
    torch call is written down. The batch is dimension 0 of the first tensor argument, and stays free; every argument
    that has as many rows is taken to be batched. Values that are not tensors become part of the graph. Modules whose
    path matches one of the shell patterns in ``opaque`` (``"blocks.*.router"``) are kept whole, as are, one by one,
    those that cannot be followed. ``model`` is not changed.

    Raises:
        CaptureError: an argument is not usable, the model fails on the example, or ``opaque`` matches no module.
    """
    kwargs = kwargs or {}
    asked = matching_paths(model, opaque)
    leaves, structure = call_leaves(model.forward, args, kwargs)
    inputs = input_spec(leaves, structure, leaf_paths(model.forward, args, kwargs))
    with own_random_state(), torch.inference_mode(False), torch.enable_grad(), caches_found_once():
        for result in _attempts(model, inputs, leaves, asked, list(kwargs)):
            if agrees(result, args, kwargs):
                return replace(result, flops=forward_flops(result, args, kwargs))
        reason = "the captured graph computed something else than the model"
        warnings.warn(
            f"stagecut: {reason} ({type(model).__name__}), so the model is kept whole and cannot be cut; "
            "compile(..., opaque=[...]) can name the module to keep instead",
            stacklevel=2,
        )
        with put_back(model):
            return Ladder(model, inputs, leaves, {"": OpaqueCall("", type(model).__name__, reason)}).climb()


def _attempts(
    model: nn.Module, inputs: InputSpec, leaves: list[Any], asked: dict[str, OpaqueCall], order: list[str]
) -> Iterator[Capture]:
    """Capture with all means; then without a first run that sets attributes up; then on real tensors only."""
    ladder = Ladder(model, inputs, leaves, asked, order)
    with put_back(model):
        result = ladder.climb()
    yield replace(result, sets_itself_up=bool(ladder.warmed))
    if ladder.warmed:
        with put_back(model):
            result = Ladder(model, inputs, leaves, asked, order, may_warm_up=False).climb()
        yield replace(result, sets_itself_up=bool(ladder.warmed))
    if not ladder.real and not ladder.meta:
        with put_back(model):
            result = Ladder(model, inputs, leaves, asked, order, may_warm_up=False, real=True).climb()
        yield replace(result, sets_itself_up=bool(ladder.warmed))


__all__ = ["Capture", "CaptureError", "OpaqueCall", "capture"]
