"""Gradients of biases as matrix products, which can add to what is there as those of weights do.

A product with ones takes half as long as ``sum`` where rows are few, and no pass of its own to add what it gives. It
adds one row after the other, ``sum`` in a tree: so it rounds otherwise, as the weight's gradient does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..sinks import sums_of_rows

_aten = torch.ops.aten
_MOST_ROWS = 1024  # to be added one after the other


def sum_by_products(graph: fx.Graph, module: torch.nn.Module) -> None:
    """Replace, in place, sums that are gradients of biases; ``module`` gets the ones that they are multiplied with."""
    for node in list(graph.nodes):
        if _is_gradient_of_bias(node):
            _sum_by_product(graph, module, node)


def _is_gradient_of_bias(node: fx.Node) -> bool:
    """Say whether a node sums the rows of a matrix, few enough to be added in order, for nothing but a result."""
    given: Any = node.args
    if node.target is not _aten.sum.dim_IntList or node.kwargs or len(given) != 2 or list(given[1]) != [0]:
        return False
    matrix = given[0].meta["val"]
    return (
        matrix.dim() == 2
        and matrix.is_contiguous()
        and matrix.device.type == "cpu"
        and matrix.dtype in (torch.float32, torch.float64)
        and 0 < matrix.shape[0] <= _MOST_ROWS
        and all(user.op == "output" for user in node.users)
    )


def _sum_by_product(graph: fx.Graph, module: torch.nn.Module, node: fx.Node) -> None:
    """Sum rows by a product with ones: half of what ``sum`` costs where they are few, and it can add into place."""
    matrix: Any = node.args[0]
    transposed = next((user for user in matrix.users if user.target is _aten.t.default and user < node), None)
    with graph.inserting_before(node):
        if transposed is None:
            transposed = graph.call_function(_aten.t.default, (matrix,))
            transposed.meta = {**node.meta, "val": matrix.meta["val"].t()}
        total = graph.call_function(sums_of_rows, (transposed, _ones(graph, module, matrix.meta["val"])))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _ones(graph: fx.Graph, module: torch.nn.Module, matrix: torch.Tensor) -> fx.Node:
    """Return a node for as many ones as ``matrix`` has rows: a constant that ``module`` holds."""
    name = f"_ones_{matrix.shape[0]}_{str(matrix.dtype).removeprefix('torch.')}"
    if not hasattr(module, name):
        setattr(module, name, torch.ones(matrix.shape[0], dtype=matrix.dtype))
    known = next((node for node in graph.nodes if node.op == "get_attr" and node.target == name), None)
    if known is None:
        with graph.inserting_before(next(iter(graph.nodes))):
            known = graph.get_attr(name)
        known.meta = {"val": getattr(module, name), "forward": False}
    return known
