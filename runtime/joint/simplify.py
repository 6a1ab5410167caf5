"""Fewer ops for the same numbers: what autograd's formulas write for the general case and a recorded case can spare."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .pieces import join_pieces

_aten = torch.ops.aten


def simplify(graph: fx.Graph) -> None:
    """Leave out, in place, what changes nothing: detaching, two transpositions in a row, views of the same shape.

    A sum that keeps its dimensions only to lose them in a view loses them at once; gradients of parts of a tensor are
    put side by side without adding; a product with a transposed weight is one op.
    """
    for node in list(graph.nodes):
        same = _same_as(node)
        if same is not None:
            given: Any = node.args[0]
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            if given.target is _aten.t.default and not given.users:
                graph.erase_node(given)  # it would be a user of what only the result needs
            continue
        if node.target is _aten.view.default and _only_drops_kept(node):
            kept = node.args[0]
            with graph.inserting_before(node):
                sums = graph.call_function(_aten.sum.dim_IntList, (kept.args[0], kept.args[1]), kept.kwargs)
            sums.meta = dict(node.meta)
            node.replace_all_uses_with(sums)
            graph.erase_node(node)
            if not kept.users:
                graph.erase_node(kept)
    join_pieces(graph)
    for node in list(graph.nodes):
        if node.meta.get("forward"):
            _transpose_within(graph, node)


def _transpose_within(graph: fx.Graph, node: fx.Node) -> None:
    """Let ``linear`` transpose the weight of a product, where nothing else needs it transposed: the same, sooner."""
    given: Any = node.args
    if node.kwargs or (node.target, len(given)) not in ((_aten.addmm.default, 3), (_aten.mm.default, 2)):
        return
    *bias, rows, transposed = given
    if transposed.target is not _aten.t.default or len(transposed.users) > 1:
        return
    if any(tuple(one.meta["val"].shape) != tuple(node.meta["val"].shape[1:]) for one in bias):
        return
    with graph.inserting_before(node):
        linear = graph.call_function(_aten.linear.default, (rows, transposed.args[0], *bias))
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    graph.erase_node(node)
    graph.erase_node(transposed)


def _same_as(node: fx.Node) -> Any:
    """Return the value that ``node`` only is another view of, with the same sizes and strides."""
    given: Any = node.args[0] if node.args else None
    if node.target is _aten.detach.default:
        return given
    if node.target is _aten.t.default and given.target is _aten.t.default:
        return given.args[0]
    if node.target in (_aten.view.default, _aten.expand.default) and _layout(node) == _layout(given):
        return given
    return None


def _layout(node: fx.Node) -> Any:
    tensor = node.meta.get("val")
    return (tensor.shape, tensor.stride()) if isinstance(tensor, torch.Tensor) else node


def _only_drops_kept(view: fx.Node) -> bool:
    """Say whether a view only drops the dimension 0 that a sum over it kept."""
    kept: Any = view.args[0]
    if kept.target is not _aten.sum.dim_IntList or len(kept.args) < 3 or not kept.args[2] or len(kept.users) > 1:
        return False
    shape = view.meta["val"].shape
    return list(kept.args[1]) == [0] and kept.meta["val"].shape[1:] == shape
