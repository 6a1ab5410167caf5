"""The seconds that the loss takes on the last stage: it is captured and priced like the model itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..structure import Structure, call_leaves, map_leaves, unflatten
from .analysis import OpFacts, analyse, example_like
from .capture import capture
from .captured import Capture
from .costs.op_cost import OpCost

_MOST_DATA_BYTES = 64 << 20

Price = Callable[[Capture, dict[str, OpFacts]], Mapping[str, OpCost]]


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
        """Return a target for so many rows, of the right shapes."""

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            batched = leaf.dim() > 0 and leaf.shape[0] == self.batch_rows
            return _stand_in(example_like(leaf, rows if batched else None))

        return map_leaves(cut, self.target)


class _OfLeaves(nn.Module):
    """A loss as a module over the flat leaves of the model's result."""

    def __init__(self, function: Callable[..., Any], structure: Structure) -> None:
        super().__init__()
        self.function, self.structure = function, structure

    def forward(self, leaves: tuple[Any, ...], target: Any) -> Any:
        return self.function(unflatten(self.structure, list(leaves)), target)


def loss_seconds(
    loss: Loss, captured: Capture, facts: Mapping[str, OpFacts], rows: int, price: Price
) -> tuple[float, float]:
    """Return the seconds of forward and backward of the loss of one microbatch; ``price`` prices a captured graph.

    A loss that cannot be priced is left out, with a warning.
    """
    result = captured.trained
    leaves = [leaf.constant if leaf.node is None else facts[leaf.node].value for leaf in result.leaves]
    args = (tuple(map_leaves(_stand_in, leaf) for leaf in leaves), loss.target_of(rows))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = _OfLeaves(loss.function, result.structure)
            own = capture(module, args)
            flat, _ = call_leaves(module.forward, args, {})
            tensors = [leaf for known, leaf in zip(own.inputs.leaves, flat) if known.graph_input is not None]
            costs = price(own, analyse(own, tensors, rows)).values()
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"stagecut: the loss cannot be priced by itself ({type(error).__name__}: {text}); "
            "the predicted step leaves it out",
            stacklevel=2,
        )
        return 0.0, 0.0
    return sum(cost.forward_s for cost in costs), sum(cost.backward_s for cost in costs)


def _stand_in(leaf: Any) -> Any:
    """Make a tensor of zeros with the same layout; one that is large stays without data."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    device = "cpu" if leaf.numel() * leaf.element_size() <= _MOST_DATA_BYTES else "meta"
    made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
    return made.zero_().requires_grad_(leaf.requires_grad)
