"""A small UNet: each level of the way down is used again on the way up, so its skips span the whole model."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Build two 3x3 convolutions that keep height and width.

    GroupNorm rather than BatchNorm: a row's result then does not depend on which rows share its microbatch.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.GroupNorm(4, out_channels),
        nn.SiLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.GroupNorm(4, out_channels),
        nn.SiLU(),
    )


class UNet(nn.Module):
    """Give every pixel ``out_channels`` logits (https://arxiv.org/abs/1505.04597).

    Height and width must be divisible by ``2 ** depth``; ``width`` must be divisible by 4 (the norm's groups).
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 4, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem = conv_block(in_channels, width)
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(conv_block(upper, lower) for upper, lower in pairwise(widths))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(lower, upper, 2, stride=2) for upper, lower in pairwise(widths))
        self.up = nn.ModuleList(conv_block(2 * upper, upper) for upper in widths[:-1])
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_channels, H, W)`` for ``(B, in_channels, H, W)``."""
        x = self.stem(x)  # (B, width, H, W)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(self.pool(x))  # (B, C, H, W) -> (B, 2C, H/2, W/2)
        for level in reversed(range(len(self.up))):
            x = self.grow[level](x)  # (B, 2C, H/2, W/2) -> (B, C, H, W)
            x = self.up[level](torch.cat([skips[level], x], dim=1))  # (B, 2C, H, W) -> (B, C, H, W)
        logits: Tensor = self.head(x)  # (B, out_channels, H, W)
        return logits
