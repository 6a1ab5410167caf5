"""The arguments of the example call, described, and made again for other sizes."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..errors import CaptureError
from ..runtime.program import InputLeaf, InputSpec
from ..structure import Structure


def input_spec(leaves: list[Any], structure: Structure, paths: list[str]) -> InputSpec:
    """Describe the arguments of the example call."""
    rows = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
    if rows is None:
        raise CaptureError(
            "the example call has no tensor argument with a batch dimension",
            hint="pass example inputs whose first tensor has the samples in dimension 0",
        )
    known: list[InputLeaf] = []
    used: set[str] = set()
    first: dict[int, int] = {}
    for index, (path, leaf) in enumerate(zip(paths, leaves)):
        if not isinstance(leaf, torch.Tensor):
            known.append(InputLeaf(path, None, leaf))
            continue
        same = first.setdefault(id(leaf), index)
        name = _unused(re.sub(r"\W", "_", path), used)
        batched = leaf.dim() > 0 and leaf.shape[0] == rows
        shape = (None, *leaf.shape[1:]) if batched else tuple(leaf.shape)
        known.append(InputLeaf(path, name, None, batched, shape, None if same == index else same, leaf.dtype))
    return InputSpec(structure, tuple(known))


def _unused(name: str, used: set[str]) -> str:
    while name in used:
        name += "_"
    used.add(name)
    return name


def tensors_of(leaves: list[Any]) -> list[torch.Tensor]:
    """List the tensors among leaves."""
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def fake_argument(leaf: Any, rows: int | None, others: dict[int, int], meta: bool) -> Any:
    """Make an argument without data, for ``rows`` samples; ``others`` maps sizes to other ones."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    sizes = [others.get(size, size) for size in leaf.shape]
    shape = torch.Size([leaf.shape[0] if rows is None else rows, *sizes[1:]] if sizes else [])
    device = "meta" if meta else leaf.device
    made = torch.empty(shape, dtype=leaf.dtype, device=device)
    if leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last) and not leaf.is_contiguous():
        made = made.to(memory_format=torch.channels_last)
    return made.requires_grad_(leaf.requires_grad)


def real_argument(leaf: Any, rows: int | None) -> Any:
    """Take an argument for ``rows`` samples from the example's own rows, again and again."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if rows is not None:
        leaf = leaf.detach().repeat(-(-rows // leaf.shape[0]), *[1] * (leaf.dim() - 1))[:rows]
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)
