"""Batches: a call's arguments cut into microbatches, and microbatches' results put together again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ShapeError
from ..structure import call_leaves, flatten, map_leaves, unflatten
from .program.specs import InputSpec


def match_inputs(
    spec: InputSpec, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], int]:
    """Return the graph inputs by name, and the batch's row count.

    Raises:
        ShapeError: the arguments differ from those that the model was captured with in more than tensor values
            and row count.
    """
    leaves, structure = call_leaves(forward, args, kwargs)
    if structure != spec.structure:
        raise ShapeError(
            f"the model was captured with arguments {_names(spec)}, and is called with another structure",
            hint="call stagecut.compile(...) again for calls of another form",
        )
    problem = spec.mismatch(leaves)
    if problem is not None:
        raise ShapeError(problem, hint="call stagecut.compile(...) again for other arguments")
    inputs: dict[str, torch.Tensor] = {}
    rows: int | None = None
    for known, leaf in zip(spec.leaves, leaves):
        if known.graph_input is None:
            continue
        if leaf.requires_grad:
            raise ShapeError(
                f"argument {known.path!r} requires a gradient, which a pipeline does not return",
                hint=f"pass {known.path}.detach()",
            )
        if known.batched:
            rows = _rows_of(known.path, leaf, rows)
        inputs[known.graph_input] = leaf
    if rows == 0:
        raise ShapeError("the batch has no rows")
    return inputs, 1 if rows is None else rows


def _rows_of(path: str, leaf: torch.Tensor, rows: int | None) -> int:
    if leaf.dim() == 0:
        raise ShapeError(f"argument {path!r} has no batch dimension; it had one when the model was captured")
    if rows is not None and leaf.shape[0] != rows:
        raise ShapeError(f"argument {path!r} has {leaf.shape[0]} rows where the first argument has {rows}")
    return leaf.shape[0]


def _names(spec: InputSpec) -> str:
    return "(" + ", ".join(leaf.path for leaf in spec.leaves) + ")"


def _same_constant(known: Any, given: Any) -> bool:
    if known is given:
        return True
    if isinstance(known, float) and isinstance(given, float) and math.isnan(known):
        return math.isnan(given)
    try:
        return type(known) is type(given) and bool(known == given)
    except Exception:
        return False


def piece_sizes(rows: int, n_pieces: int) -> list[int]:
    """Cut ``rows`` into at most ``n_pieces`` non-empty pieces whose sizes differ by one at most.

    >>> piece_sizes(10, 4)
    [3, 3, 2, 2]
    >>> piece_sizes(2, 4)
    [1, 1]
    """
    n_pieces = min(rows, n_pieces)
    size, longer = divmod(rows, n_pieces)
    return [size + 1] * longer + [size] * (n_pieces - longer)


def split_inputs(spec: InputSpec, inputs: dict[str, torch.Tensor], sizes: Sequence[int]) -> tuple[dict[str, Any], ...]:
    """Cut the batched inputs along dimension 0; every microbatch sees the others whole.

    Raises:
        ShapeError: the model runs for one batch size only, and a piece has another.
    """
    if spec.rows is not None and any(size != spec.rows for size in sizes):
        raise ShapeError(
            f"the model runs for batches of {spec.rows} rows only, and would be given {list(sizes)}",
            hint="stagecut.compile(..., microbatches=1)",
        )
    pieces: list[dict[str, Any]] = [{} for _ in sizes]
    for leaf in spec.leaves:
        if leaf.graph_input is None:
            continue
        tensor = inputs[leaf.graph_input]
        parts = torch.split(tensor, list(sizes)) if leaf.batched else [tensor] * len(sizes)
        for piece, part in zip(pieces, parts):
            piece[leaf.graph_input] = part
    return tuple(pieces)


def joined_inputs(spec: InputSpec, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put microbatches' inputs together again: the inverse of :func:`split_inputs`."""
    if len(pieces) == 1:
        return pieces[0]
    batched = {leaf.graph_input for leaf in spec.leaves if leaf.batched}
    return {
        name: torch.cat([piece[name] for piece in pieces]) if name in batched else value
        for name, value in pieces[0].items()
    }


def rows_of(spec: InputSpec, piece: dict[str, Any]) -> int:
    """Count the rows of a microbatch."""
    batched = [leaf.graph_input for leaf in spec.leaves if leaf.batched]
    return int(piece[batched[0]].shape[0]) if batched and batched[0] is not None else 1


def split_target(target: Any, rows: int, sizes: Sequence[int]) -> tuple[Any, ...]:
    """Cut every tensor of ``target`` that has ``rows`` rows; the rest goes whole to every microbatch."""
    leaves, structure = flatten(target)
    parts = [
        torch.split(leaf, list(sizes))
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == rows
        else [leaf] * len(sizes)
        for leaf in leaves
    ]
    return tuple(unflatten(structure, [part[m] for part in parts]) for m in range(len(sizes)))


def signature_of(inputs: tuple[dict[str, Any], ...], mode: int) -> tuple[int, ...]:
    """Number microbatches so that equal numbers mean equal shapes and dtypes."""
    keys = [
        tuple((name, tuple(value.shape), str(value.dtype)) for name, value in sorted(piece.items())) for piece in inputs
    ]
    return tuple(hash((key, mode)) for key in keys)


def merge_outputs(outputs: list[Any], sizes: Sequence[int]) -> tuple[Any, list[str]]:
    """Put the results of all microbatches together; also says per leaf how: ``cat``, ``mean`` or ``same``.

    Tensors with one row per sample are concatenated, 0-dim floating tensors (a loss, say) are averaged by rows,
    everything else must be equal in all microbatches.

    Raises:
        ShapeError: a leaf is none of these.
    """
    flat = [flatten(output) for output in outputs]
    structure = flat[0][1]
    if any(other != structure for _, other in flat):
        raise ShapeError("the model's result has another structure in different microbatches")
    merged, how = [], []
    for index in range(structure.n_leaves):
        leaf, kind = _merge_leaf([leaves[index] for leaves, _ in flat], sizes, index)
        merged.append(leaf)
        how.append(kind)
    return unflatten(structure, merged), how


def _merge_leaf(parts: list[Any], sizes: Sequence[int], index: int) -> tuple[Any, str]:
    if all(isinstance(part, torch.Tensor) for part in parts):
        if all(part.dim() and part.shape[0] == size for part, size in zip(parts, sizes)):
            return torch.cat(parts), "cat"
        if all(part.dim() == 0 and part.is_floating_point() for part in parts):
            weights = shares(sizes)
            return torch.stack([part * weight for part, weight in zip(parts, weights)]).sum(), "mean"
        if all(part.shape == parts[0].shape and torch.equal(part, parts[0]) for part in parts[1:]):
            return parts[0], "same"
    elif all(_same_constant(parts[0], part) for part in parts[1:]):
        return parts[0], "same"
    shapes = {tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts}
    raise ShapeError(
        f"leaf {index} of the model's result ({', '.join(map(str, shapes))}) is neither one row per sample, nor a "
        "scalar, nor equal in all microbatches, so the microbatches' results cannot be put together",
        hint="use pm.step(..., target=...) with a loss_fn, which needs only the loss",
    )


def split_gradients(gradients: list[Any], how: list[str], sizes: Sequence[int]) -> tuple[list[Any], ...]:
    """Cut the gradients of a merged result into those of each microbatch's result (the inverse of merging)."""
    per_leaf: list[Sequence[Any]] = []
    for gradient, kind in zip(gradients, how):
        if gradient is None:
            per_leaf.append([None] * len(sizes))
        elif kind == "cat":
            per_leaf.append(torch.split(gradient, list(sizes)))
        else:
            per_leaf.append([gradient * weight for weight in shares(sizes)])
    return tuple([parts[m] for parts in per_leaf] for m in range(len(sizes)))


def shares(weights: Sequence[float]) -> list[float]:
    """Divide by the sum.

    Raises:
        ShapeError: the weights add up to nothing.
    """
    total = sum(weights)
    if not total > 0:
        raise ShapeError(f"the microbatches' loss weights must add up to a positive number, got {total}")
    return [weight / total for weight in weights]


def where_given(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Bring a result to the device of the first tensor of the call that it is a result of."""
    leaves, _ = flatten([args, kwargs])
    device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
    return map_leaves(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def cloned(value: Any) -> Any:
    """Copy every tensor of ``value``, for a function that may write to its arguments."""
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)
