"""A deep multilayer perceptron: many equal layers in one chain."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


class MLP(nn.Module):
    """Map ``(B, in_features)`` to ``(B, out_features)`` through ``n_layers`` hidden layers of equal width.

    Each hidden layer normalises before its activation, so that a chain of dozens of layers still trains.
    """

    def __init__(self, in_features: int = 64, width: int = 256, n_layers: int = 16, out_features: int = 10) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(n_layers):
            layers[f"linear{index}"] = nn.Linear(in_features if index == 0 else width, width)
            layers[f"norm{index}"] = nn.LayerNorm(width)
            layers[f"act{index}"] = nn.GELU()
        self.body = nn.Sequential(layers)
        self.head = nn.Linear(width if n_layers else in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_features)`` for ``(B, in_features)``."""
        out: Tensor = self.head(self.body(x))
        return out
