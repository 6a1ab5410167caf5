"""Large products of 32-bit floats by oneDNN, where that was asked for (../../products.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...products import by_onednn


def multiply_by_onednn(graph: fx.Graph) -> None:
    """Let oneDNN compute, in place, the products that it is quicker at."""
    for node in graph.nodes:
        if node.op == "call_function" and not node.kwargs:
            node.target = by_onednn(node.target, [_example(argument) for argument in node.args]) or node.target


def _example(argument: Any) -> Any:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    return value if isinstance(value, torch.Tensor) else argument
