"""The gradients of a model as one vector: its norm, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..errors import ConstraintError, StagecutError
from .sharded import dense


def own_norm(parameters: Iterable[nn.Parameter], norm_type: float) -> torch.Tensor:
    """Return the norm of the gradients of ``parameters``, taken as one vector; 0 where there are none.

    Each parameter counts once, however many modules share it.

    Raises:
        ConstraintError: ``norm_type`` is not positive, so that norms of parts do not make the norm of the whole.
    """
    if not norm_type > 0:
        raise ConstraintError(f"norm_type must be positive, got {norm_type}", hint="norm_type=2.0, or float('inf')")
    unique = {id(parameter): parameter for parameter in parameters}
    found = [parameter.grad for parameter in unique.values() if parameter.grad is not None]
    norm: torch.Tensor = dense(torch.nn.utils.get_total_norm(found, norm_type))
    return norm


def joined_norm(own: torch.Tensor, norm_type: float, all_reduce: Callable[[torch.Tensor, str], object]) -> torch.Tensor:
    """Return the norm of a vector of which every process has a part with the norm ``own``.

    ``all_reduce`` adds up a tensor over all processes, or takes its largest: ``"sum"``, ``"max"``.
    """
    if math.isinf(norm_type):
        total = own.detach().double().cpu()
        all_reduce(total, "max")
        return total
    total = own.detach().double().cpu() ** norm_type
    all_reduce(total, "sum")
    return total ** (1.0 / norm_type)


def clip(
    parameters: Iterable[nn.Parameter], norm: torch.Tensor, max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> torch.Tensor:
    """Scale the gradients of ``parameters`` so that the norm of all, which is ``norm``, is ``max_norm`` at most.

    Raises:
        StagecutError: the norm is not finite, and that was to be an error.
    """
    if error_if_nonfinite and not torch.isfinite(norm):
        raise StagecutError(
            f"the norm of order {norm_type:g} of all gradients is {norm.item()}, so they cannot be clipped",
            hint="look for the first loss that is not finite, or pass error_if_nonfinite=False",
        )
    unique = {id(parameter): parameter for parameter in parameters}
    sharded = [p for p in unique.values() if hasattr(p.grad, "full_tensor")]
    whole = [p for p in unique.values() if not hasattr(p.grad, "full_tensor")]
    for some in (sharded, whole):
        torch.nn.utils.clip_grads_with_norm_(some, max_norm, norm)
    return norm
