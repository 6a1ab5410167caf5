"""A GPT-like causal language model whose input and output embeddings can be one tied parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def next_token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Average the cross-entropy of logits ``(B, T, V)`` over the tokens of ``target`` ``(B, T)``."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class CausalSelfAttention(nn.Module):
    """Let each position attend to itself and to those before it."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model must be divisible by n_heads (d_model: {d_model}, n_heads: {n_heads})")
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, C) -> (B, T, 3, H, C/H)
        heads = heads.permute(2, 0, 3, 1, 4)  # (3, B, H, T, C/H)
        y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)  # (B, H, T, C/H)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))  # (B, T, C)
        return out


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added to its input."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = CausalSelfAttention(d_model, n_heads)
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


class GPT(nn.Module):
    """Predict each next token from those before it; ``tied`` shares one matrix between input and output.

    Nothing in ``forward`` branches on a value or fixes the batch, so ``torch.fx`` traces it with both the batch and
    the length (up to ``max_len``) free.
    """

    def __init__(self, vocab: int, d_model: int, n_layers: int, n_heads: int, max_len: int, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, d_model)
        self.positions = nn.Parameter(torch.zeros(max_len, d_model))
        self.blocks = nn.Sequential(*(TransformerBlock(d_model, n_heads) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab, bias=False)
        # Embedding's own N(0, 1) would make the first logits of a tied head as large as sqrt(d_model).
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``(B, T, vocab)`` for token numbers ``(B, T)``, ``T`` at most ``max_len``."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]  # (B, T) -> (B, T, C)
        logits: Tensor = self.head(self.norm(self.blocks(x)))  # (B, T, vocab)
        return logits
