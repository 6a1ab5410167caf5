"""Ops whose result may take the memory of an argument that nobody needs any more.

``mm`` makes a gradient, ``gelu_backward`` reads it once and makes another of the same size: written over the first one
it stays in the processor's caches, and the peak of memory is lower by one value. The numbers are the same.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...products import PRODUCTS
from ..sinks import sums_of_rows
from .effects import aliased
from .pieces import joined

_aten = torch.ops.aten
# Element-wise ops with their in-place form, and the arguments that may be written over; the other is read at the same
# place at the latest.
_IN_PLACE: dict[Any, tuple[Any, tuple[int, ...]]] = {
    _aten.add.Tensor: (_aten.add_.Tensor, (0, 1)),
    _aten.mul.Tensor: (_aten.mul_.Tensor, (0, 1)),
    _aten.sub.Tensor: (_aten.sub_.Tensor, (0,)),
    _aten.div.Tensor: (_aten.div_.Tensor, (0,)),
    _aten.mul.Scalar: (_aten.mul_.Scalar, (0,)),
    _aten.div.Scalar: (_aten.div_.Scalar, (0,)),
    _aten.neg.default: (_aten.neg_.default, (0,)),
    _aten.relu.default: (_aten.relu_.default, (0,)),
    _aten.tanh.default: (_aten.tanh_.default, (0,)),
    _aten.sigmoid.default: (_aten.sigmoid_.default, (0,)),
}
# The same with an argument for the result: derivatives, whose first argument is a gradient.
_INTO = {
    _aten.gelu_backward.default: _aten.gelu_backward.grad_input,
    _aten.threshold_backward.default: _aten.threshold_backward.grad_input,
    _aten.tanh_backward.default: _aten.tanh_backward.grad_input,
    _aten.sigmoid_backward.default: _aten.sigmoid_backward.grad_input,
    _aten.silu_backward.default: _aten.silu_backward.grad_input,
    _aten.leaky_relu_backward.default: _aten.leaky_relu_backward.grad_input,
    _aten.elu_backward.default: _aten.elu_backward.grad_input,
    _aten.hardtanh_backward.default: _aten.hardtanh_backward.grad_input,
}
# Ops that are known to return memory of their own; schemas do not always say when one returns its argument.
_FRESH = {
    joined,
    sums_of_rows,
    *PRODUCTS,
    *_IN_PLACE,
    *_INTO,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.linear.default,
    _aten.bmm.default,
    _aten.native_layer_norm.default,
    _aten.native_layer_norm_backward.default,
    _aten.native_batch_norm.default,
    _aten.native_batch_norm_backward.default,
    _aten.convolution.default,
    _aten.convolution_backward.default,
    _aten.max_pool2d_with_indices_backward.default,
    _aten.gelu.default,
    _aten.silu.default,
    _aten.clone.default,
}
_VIEWS = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
)


def over_arguments(
    body: Sequence[fx.Node], dropped: Mapping[str, Collection[str]], kept: Collection[str]
) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Return what to call instead, with which arguments, for nodes that may write over an argument.

    Args:
        body: nodes in the order in which they run.
        dropped: per node, the values that nobody needs after it.
        kept: values that somebody else may hold.
    """
    origin: dict[str, str] = {}  # whose memory a value is in, where that is known
    alive: dict[str, set[str]] = {}  # the values in the same memory that are still needed
    found: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
    for node in body:
        gone = set(dropped[node.name])
        given: Any = node.args[0] if node.args else None
        place = _place_for(node, origin, alive, gone, kept)
        if place is not None:
            found[node.name] = _instead(node, place)
            origin[node.name] = origin[place.name]
        elif node.target is operator.getitem and given.target in _FRESH:
            if given.name in origin and given.name not in kept:
                origin[node.name] = f"{given}.{node.args[1]}"  # one of several results, each in memory of its own
        elif node.target in _VIEWS:
            if given.name in origin:
                origin[node.name] = origin[given.name]
        elif node.target in _FRESH:
            origin[node.name] = node.name
        else:
            # The memory of such an argument may go on under this node's name.
            lost = {origin.get(argument.name) for argument in _maybe_returned(node)}
            origin = {name: first for name, first in origin.items() if first not in lost}
        if node.name in origin:
            alive.setdefault(origin[node.name], set()).add(node.name)
        for name in gone & origin.keys():
            alive[origin[name]].discard(name)
    return found


def _maybe_returned(node: fx.Node) -> list[fx.Node]:
    """List the arguments whose memory an op may write to, or return."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is _aten.native_dropout.default:
        return node.all_input_nodes
    return aliased(node)


def _place_for(
    node: fx.Node,
    origin: Mapping[str, str],
    alive: Mapping[str, set[str]],
    gone: set[str],
    kept: Collection[str],
) -> fx.Node | None:
    """Return an argument whose memory is free for the result, and of the same layout."""
    if node.target in _IN_PLACE and not node.kwargs:
        candidates = [node.args[index] for index in _IN_PLACE[node.target][1]]
    elif node.target in _INTO:
        candidates = [node.args[0]]
    else:
        return None
    for argument in candidates:
        if not isinstance(argument, fx.Node) or argument.name not in origin or argument.name not in gone:
            continue
        if node.args.count(argument) > 1:
            continue
        shared = alive[origin[argument.name]]
        others = {other.name for other in node.all_input_nodes if other is not argument}
        unheld = shared <= gone and not shared & others and not _family(origin, argument.name) & set(kept)
        if unheld and _same_layout(argument, node):
            return argument
    return None


def _family(origin: Mapping[str, str], name: str) -> set[str]:
    return {other for other, first in origin.items() if first == origin[name]}


def _same_layout(argument: fx.Node, node: fx.Node) -> bool:
    a, b = argument.meta.get("val"), node.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return _is_dense(a) and (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Say whether every element has a place of its own, and no place is left between them."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _instead(node: fx.Node, place: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if node.target in _INTO:
        return _INTO[node.target], node.args, {**node.kwargs, "grad_input": place}
    others = [argument for argument in node.args if argument is not place]
    return _IN_PLACE[node.target][0], (place, *others), {}
