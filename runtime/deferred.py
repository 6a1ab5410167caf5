"""BatchNorm whose running statistics are those of the whole batch, updated once a step.

Each microbatch is normalised by its own mean and variance, as always. Where nn.BatchNorm moves its running statistics
a little towards those of each microbatch, this one adds up what it sees, by the pairwise update of Chan, Golub and
LeVeque (1979, http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf), over microbatches and then
replicas, and moves them once, as one forward of the whole batch would have. The idea is torchgpipe's (Kim et al., 2020,
https://arxiv.org/abs/2004.09910).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class DeferredBatchNorm(nn.Module):
    """Normalises like ``norm``, whose weight, bias and mode it uses, and leaves its buffers alone until :meth:`update`.

    What was seen since is in ``count``, ``mean`` and ``spread`` (the sum of squared distances from the mean), of shapes
    ``()``, ``(C,)`` and ``(C,)``.
    """

    norm: _BatchNorm
    count: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm
        device = norm.running_mean.device if norm.running_mean is not None else None
        zeros = torch.zeros(norm.num_features, dtype=torch.float64, device=device)
        self.register_buffer("count", zeros.new_zeros(()))
        self.register_buffer("mean", zeros)
        self.register_buffer("spread", zeros.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``(N, C, ...)``."""
        norm = self.norm
        if not norm.training or norm.running_mean is None:
            result: torch.Tensor = norm(x)
            return result
        self._note(x.detach())
        return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)

    @torch.no_grad()
    def _note(self, x: torch.Tensor) -> None:
        n = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x.double(), [d for d in range(x.dim()) if d != 1], correction=0)
        distance, total = mean - self.mean, self.count + n
        self.spread.add_(variance * n + distance.square() * (self.count * n / total))
        self.mean.add_(distance * (n / total))
        self.count.add_(n)

    def take(self) -> torch.Tensor:
        """Return what was seen, as one row of ``1 + 2 C`` numbers, and begin anew."""
        seen = torch.cat([self.count.reshape(1), self.mean, self.spread])
        for buffer in (self.count, self.mean, self.spread):
            buffer.zero_()
        return seen

    @torch.no_grad()
    def update(self, seen: Sequence[torch.Tensor]) -> None:
        """Move the running statistics towards those of what all replicas have seen, in their order."""
        count, mean, spread = seen[0].new_zeros(()), torch.zeros_like(self.mean), torch.zeros_like(self.spread)
        for row in seen:
            n, own_mean, own_spread = row[0], *row[1:].chunk(2)
            if n == 0:
                continue
            distance, total = own_mean - mean, count + n
            spread += own_spread + distance.square() * (count * n / total)
            mean += distance * (n / total)
            count = total
        norm = self.norm
        if count == 0 or norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            return
        norm.num_batches_tracked.add_(1)
        share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_((spread / (count - 1).clamp(min=1)).to(norm.running_var.dtype), share)
