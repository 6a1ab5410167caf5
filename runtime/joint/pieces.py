"""Gradients of parts of a tensor, put side by side at once.

For ``q, k, v = qkv[0], qkv[1], qkv[2]`` autograd makes three tensors as large as ``qkv``, zero but for one part each,
and adds them up; a permutation that follows copies the sum once more. Here each part is copied to where it belongs,
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from .effects import Effects

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Piece:
    """What one op pads with zeros: ``gradient`` belongs at ``start`` to ``end`` of dimension ``dim``."""

    gradient: fx.Node
    of: tuple[Any, ...]  # sizes and dtype of the whole
    dim: int
    start: int
    end: int
    drops: bool  # whether the part has lost that dimension


def join_pieces(graph: fx.Graph) -> None:
    """Replace, in place, sums of gradients of parts that do not overlap, and that nothing changes in between."""
    if not any(node.target in _PADS for node in graph.nodes):
        return
    effects = Effects(graph)
    for node in reversed(list(graph.nodes)):
        if node.users and node.target is _aten.add.Tensor:
            leaves = _leaves(node)
            pieces = [_piece_of(leaf) for leaf in leaves]
            touched = [*leaves, node, *(piece.gradient for piece in pieces if piece is not None)]
            if len(leaves) > 1 and _can_be_joined(pieces, node) and not any(map(effects.is_changed, touched)):
                _replace(graph, node, [piece for piece in pieces if piece is not None])
    for node in reversed(list(graph.nodes)):
        if not node.users and node.target in (_aten.add.Tensor, *_PADS):
            graph.erase_node(node)


def joined(
    gradients: Sequence[torch.Tensor],
    sizes: Sequence[int],
    dim: int,
    places: Sequence[tuple[int, int]],
    order: Sequence[int],
    fill: bool,
) -> torch.Tensor:
    """Put gradients of parts of a tensor of ``sizes`` side by side, and return it with its dimensions in ``order``.

    The result is dense in that order; ``fill`` says that the parts leave some of it zero.
    """
    made = gradients[0].new_empty([sizes[d] for d in order])
    if fill:
        made.zero_()
    whole = made.permute([order.index(d) for d in range(len(order))])
    for gradient, (start, end) in zip(gradients, places):
        part = whole.narrow(dim, start, end - start)
        part.copy_(gradient if gradient.dim() == whole.dim() else gradient.unsqueeze(dim))
    return made


_PADS = (_aten.select_backward.default, _aten.slice_backward.default)


def _leaves(node: fx.Node) -> list[fx.Node]:
    """List what a sum is of, in the order in which it adds; a sum that others use is a leaf."""
    found: list[fx.Node] = []
    for argument in node.args:
        if not isinstance(argument, fx.Node):
            return []
        inner = argument.target is _aten.add.Tensor and len(argument.users) == 1 and not argument.kwargs
        found += _leaves(argument) if inner else [argument]
    return found


def _piece_of(node: fx.Node) -> _Piece | None:
    if node.target not in _PADS or len(node.users) != 1:
        return None
    arguments: Any = node.args
    gradient, sizes, dim = arguments[:3]
    of, dim = (*sizes, node.meta["val"].dtype), _within(dim, len(sizes))
    if node.target is _aten.select_backward.default:
        index = _within(arguments[3], sizes[dim])
        return _Piece(gradient, of, dim, index, index + 1, True)
    start, end, step = arguments[3:]
    first, last, _ = slice(start, end).indices(sizes[dim])
    return _Piece(gradient, of, dim, first, last, False) if step == 1 else None


def _within(index: Any, n: int) -> int:
    return int(index) + n if index < 0 else int(index)


def _can_be_joined(pieces: Sequence[_Piece | None], total: fx.Node) -> bool:
    own = [piece for piece in pieces if piece is not None]
    if len(own) < len(pieces) or total.kwargs or len({(piece.of, piece.dim, piece.drops) for piece in own}) > 1:
        return False
    ordered = sorted((piece.start, piece.end) for piece in own)
    apart = all(end <= start for (_, end), (start, _) in pairwise(ordered))
    return apart and bool(total.meta["val"].is_contiguous())


def _replace(graph: fx.Graph, total: fx.Node, pieces: Sequence[_Piece]) -> None:
    sizes = list(total.meta["val"].shape)
    copied = _copied_in(total)
    order = list(range(len(sizes))) if copied is None else copied[0]
    last = total if copied is None else copied[1]
    covered = sum(piece.end - piece.start for piece in pieces)
    places = [(piece.start, piece.end) for piece in pieces]
    arguments = ([piece.gradient for piece in pieces], sizes, pieces[0].dim, places, order)
    with graph.inserting_before(total):
        made = graph.call_function(joined, (*arguments, covered < sizes[pieces[0].dim]))
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    while last is not total:
        before: Any = last.args[0]
        graph.erase_node(last)
        last = before
    graph.erase_node(total)


def _copied_in(total: fx.Node) -> tuple[list[int], fx.Node] | None:
    """Return the order of dimensions in which a sum is copied, and the copy, if that is all it is used for."""
    if len(total.users) != 1:
        return None
    (permuted,) = total.users
    if permuted.target is not _aten.permute.default or len(permuted.users) != 1:
        return None
    (copy,) = permuted.users
    if copy.target is not _aten.clone.default or copy.kwargs.get("memory_format") is not torch.contiguous_format:
        return None
    dims: Any = permuted.args[1]
    return [_within(d, len(dims)) for d in dims], copy
