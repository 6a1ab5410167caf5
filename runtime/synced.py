"""BatchNorm that normalises by the statistics of all replicas' microbatches, as one device would those rows together.

The k-th microbatches of a stage's replicas are one round: consecutive rows of the batch. Forward and backward of a
round exchange what nn.SyncBatchNorm does (https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html),
which itself runs on GPUs only and knows of one group of processes, all of which take part every time. Here the last
round of a short batch has fewer replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .groups import make_group

Exchange = Callable[[torch.Tensor], list[torch.Tensor]]


class Rounds:
    """How one replica of a stage hears what the others have seen of a round.

    ``exchanges`` holds, per number of replicas, what gives every one of the first so many the rows of all of them, in
    their order: a collective call.
    """

    def __init__(self, n_replicas: int, exchanges: Mapping[int, Exchange]) -> None:
        self._n_replicas = n_replicas
        self._exchanges = exchanges
        self._n_microbatches = 0

    def begin(self, n_microbatches: int) -> None:
        """Start a step with so many microbatches in all."""
        self._n_microbatches = n_microbatches

    def exchange(self, m: int) -> Exchange:
        """Return what exchanges rows with the replicas that are in the round of microbatch ``m``."""
        n_present = min(self._n_replicas, self._n_microbatches - (m - m % self._n_replicas))
        return self._exchanges[n_present] if n_present > 1 else _alone


def rounds_of(owners: Sequence[int], backend: str, timeout_s: float | None = None) -> Rounds:
    """Make the process groups of the first two, three, ... of a stage's replicas; a call that all ranks make alike.

    With a backend for CPUs statistics of other devices travel by way of the CPU. A replica is waited for ``timeout_s``.
    """
    exchanges = {}
    for n in range(2, len(owners) + 1):
        group = make_group(owners[:n], backend, timeout_s)
        exchanges[n] = partial(_gathered, n, group, None if backend == "nccl" else torch.device("cpu"))
    return Rounds(len(owners), exchanges)


def _gathered(n: int, group: Any, via: torch.device | None, row: torch.Tensor) -> list[torch.Tensor]:
    own = row if via is None else row.to(via)
    rows = [torch.empty_like(own) for _ in range(n)]
    dist.all_gather(rows, own, group=group)
    return [other.to(row.device) for other in rows]


def _alone(row: torch.Tensor) -> list[torch.Tensor]:
    return [row]


class SyncedBatchNorm(nn.Module):
    """Normalises like ``norm``, whose parameters, buffers and mode it uses, by the statistics of the whole round.

    ``exchange`` returns how, for the microbatch at hand.
    """

    norm: _BatchNorm

    def __init__(self, norm: _BatchNorm, exchange: Callable[[], Exchange]) -> None:
        super().__init__()
        self.norm = norm
        self._exchange = exchange

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``(N, C, ...)``.

        Raises:
            ValueError: a whole round has one value per channel.
        """
        norm = self.norm
        if not norm.training:
            result: torch.Tensor = norm(x)
            return result
        norm._check_input_dim(x)  # type: ignore[no-untyped-call]
        exchange = self._exchange()
        count, mean, variance = _statistics(x.detach(), exchange)
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
        if norm.running_mean is not None:
            self._remember(count, mean, variance)
        settings = (mean, variance, norm.eps, count, exchange)
        return _Normalise.apply(x, norm.weight, norm.bias, *settings)  # type: ignore[no-any-return, no-untyped-call]

    @torch.no_grad()
    def _remember(self, count: float, mean: torch.Tensor, variance: torch.Tensor) -> None:
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), share)


def _channels(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Give a row of C numbers the shape that broadcasts over ``x``."""
    return row.reshape(1, -1, *[1] * (x.dim() - 2))


def _over_rows(x: torch.Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _statistics(x: torch.Tensor, exchange: Exchange) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Return how many values a channel has in the round, their mean, and their variance (divided by their number)."""
    n = x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x.double(), _over_rows(x), correction=0)
    rows = exchange(torch.cat([mean.new_full((1,), n), mean, variance]))
    counts = torch.stack([row[0] for row in rows])
    means, variances = (torch.stack(parts) for parts in zip(*(row[1:].chunk(2) for row in rows)))
    weights = (counts / counts.sum()).unsqueeze(1)
    together = (means * weights).sum(0)
    spread = ((variances + (means - together).square()) * weights).sum(0)
    return float(counts.sum()), together, spread


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, where mean and variance depend on all replicas' ``x``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
        count: float,
        exchange: Exchange,
    ) -> torch.Tensor:
        kind = torch.float64 if x.dtype is torch.float64 else torch.float32
        mean, variance = mean.to(kind), variance.to(kind)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.count, ctx.exchange = eps, count, exchange
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        inverse = torch.rsqrt(variance + ctx.eps)
        normal = (x.to(inverse.dtype) - _channels(x, mean)) * _channels(x, inverse)
        own = gradient.to(inverse.dtype)
        for_bias = own.sum(_over_rows(x))
        for_weight = (own * normal).sum(_over_rows(x))
        # Every replica takes part, whoever needs the result: others do.
        rows = ctx.exchange(torch.cat([for_bias, for_weight]))
        of_mean, of_normal = (torch.stack(rows).sum(0) / ctx.count).chunk(2)
        for_x = None
        if ctx.needs_input_grad[0]:
            scale = inverse if weight is None else inverse * weight.to(inverse.dtype)
            for_x = own - _channels(x, of_mean) - normal * _channels(x, of_normal)
            for_x = (for_x * _channels(x, scale)).to(x.dtype)
        kept = [own.to(x.dtype if weight is None else weight.dtype) if needed else None
                for own, needed in zip((for_weight, for_bias), ctx.needs_input_grad[1:3])]  # fmt: skip
        return for_x, *kept, None, None, None, None, None
