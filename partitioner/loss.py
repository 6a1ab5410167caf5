"""The seconds that the loss takes on the last stage: it is priced like an op of the model."""

from __future__ import annotations

import functools
import marshal
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..structure import flatten, map_leaves, unflatten
from .analysis import OpFacts, example_like
from .captured import Capture, ModelResult


@dataclass(frozen=True)
class Loss:
    """What is called on the last stage, and an example of what it is called with beside the model's result.

    Attributes:
        function: called as ``function(output, target)``.
        target: of a whole batch; tensors with as many rows as the batch are cut with it.
        batch_rows: rows of that batch.
    """

    function: Callable[..., Any]
    target: Any
    batch_rows: int

    def target_of(self, rows: int) -> Any:
        """Return a target for so many rows: tensors without data, of the right shapes."""

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            batched = leaf.dim() > 0 and leaf.shape[0] == self.batch_rows
            return example_like(leaf, rows if batched else None)

        return map_leaves(cut, self.target)


class LossCall:
    """A call of the loss for one microbatch, on made-up inputs, so that it can be timed or priced."""

    writes_inputs = False

    def __init__(self, loss: Loss, result: ModelResult, facts: Mapping[str, OpFacts], rows: int) -> None:
        self._function, self._structure = loss.function, result.structure
        self._leaves = [leaf.constant if leaf.node is None else facts[leaf.node].value for leaf in result.leaves]
        self._target = loss.target_of(rows)

    def inputs(self, make: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, Any]:
        """Build the leaves of the model's result and the target with ``make`` for each tensor."""

        def made(leaf: Any) -> Any:
            return make(leaf) if isinstance(leaf, torch.Tensor) else leaf

        return [[map_leaves(made, leaf) for leaf in self._leaves], map_leaves(made, self._target)], {}

    def values_of(self, names: Sequence[str]) -> list[Any]:
        """Return the values by these names, of which a loss has none."""
        assert not names
        return []

    def standalone(self, device: torch.device) -> tuple[Callable[..., Any], list[torch.Tensor]]:
        """Return the call as a function; a loss has no parameters of its own that are trained here."""
        return self.call, []

    def call(self, leaves: list[Any], target: Any) -> Any:
        """Compute the loss."""
        return self._function(unflatten(self._structure, leaves), target)

    def signature(self, context: str) -> str:
        """Name the work: equal signatures cost the same."""
        shapes = [_layout(leaf) for leaf in flatten((self._leaves, self._target))[0]]
        return f"{context}/loss {_identity(self._function)} {shapes}"


def _identity(function: Callable[..., Any]) -> str:
    """Tell losses apart: by name, code with its constants, defaults and what it closes over, or by a module's repr."""
    if isinstance(function, functools.partial):
        return f"partial({_identity(function.func)}, {function.args}, {function.keywords})"
    if isinstance(function, nn.Module):
        return f"{type(function).__module__}.{type(function).__qualname__} {function!r}"
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"
    code = getattr(function, "__code__", None)
    if code is None:
        return name
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    extras = (function.__defaults__, function.__kwdefaults__, cells, getattr(function, "__self__", None))
    return f"{name} {zlib.crc32(marshal.dumps(code))} {extras}"


def _layout(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{tuple(leaf.shape)}{leaf.stride()}{leaf.dtype}{leaf.requires_grad}"
    return repr(leaf)


def loss_seconds(
    loss: Loss,
    captured: Capture,
    facts: Mapping[str, OpFacts],
    rows: int,
    price: Callable[[LossCall], tuple[float, float]],
) -> tuple[float, float]:
    """Return the seconds of forward and backward of the loss of one microbatch, as ``price`` finds them.

    A loss that cannot be priced is left out, with a warning.
    """
    try:
        return price(LossCall(loss, captured.trained, facts, rows))
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"stagecut: the loss cannot be priced by itself ({type(error).__name__}: {text}); "
            "the predicted step leaves it out",
            stacklevel=2,
        )
        return 0.0, 0.0
