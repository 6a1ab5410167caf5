"""Nasty models, kind ``shapes``: the Python of forward computes with sizes, those of the batch above all."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from nasty_base import WIDTH, Registry, features, images, sequences, tokens, two
from torch import nn

shapes = Registry("shapes")


@shapes.forward()
def branch_on_ndim(self, x):
    h = self.lin(x)
    if h.ndim == 2:
        h = h.unsqueeze(1)
    return self.out(h.mean(1))


@shapes.forward()
def branch_on_rows(self, x):
    h = self.lin(x)
    h = h.tanh() if x.shape[0] > 5 else h.sin()
    return self.out(h)


@shapes.forward()
def branch_on_even_rows(self, x):
    h = self.lin(x)
    if len(x) % 2:
        h = torch.cat([h, h.mean(0, keepdim=True)])
    return self.out(h)


@shapes.forward()
def branch_on_min_rows(self, x):
    n = min(x.shape[0], 5)
    return self.out(torch.cat([self.lin(x[:n]), x[n:]]))


@shapes.forward()
def branch_on_max_rows(self, x):
    n = max(x.size(0), 5)
    return self.out(self.lin(x)) * n


@shapes.forward()
def columns_in_a_loop(self, x):
    h = self.lin(x)
    total = 0
    for i in range(x.shape[1]):
        total = total + (i + 1) * h[:, i].tanh()
    return self.out(h * total[:, None])


@shapes.forward()
def rows_in_a_loop(self, x):
    return self.out(torch.stack([self.lin(row).tanh() for row in x]))


@shapes.forward()
def rows_enumerated(self, x):
    return self.out(torch.stack([row * (i + 1) for i, row in enumerate(self.lin(x))]))


@shapes.forward()
def rows_by_index(self, x):
    h = self.lin(x)
    return self.out(torch.stack([h[i] + h[i - 1] for i in range(len(h))]))


@shapes.forward()
def rows_unbound(self, x):
    state = torch.zeros(WIDTH)
    states = []
    for row in self.lin(x).unbind(0):
        state = 0.5 * state + row
        states.append(state)
    return self.out(torch.stack(states))


@shapes.forward(two)
def rows_zipped(self, x, y):
    return self.out(torch.stack([self.lin(a) * b for a, b in zip(x, y)]))


@shapes.forward()
def first_row_by_iteration(self, x):
    return self.out(self.lin(x) - next(iter(x)))


@shapes.forward(sequences)
def rows_in_view(self, x):
    return self.out(self.lin(x).transpose(1, 2).reshape(x.shape[0], WIDTH, -1).mean(-1).view(x.shape[0], -1))


@shapes.forward(sequences, parts={"token": lambda: nn.Parameter(torch.randn(1, 1, WIDTH))})
def rows_in_expand(self, x):
    return self.out(torch.cat([self.token.expand(x.shape[0], -1, -1), self.lin(x)], 1))


@shapes.forward()
def rows_in_arange(self, x):
    return self.out(self.lin(x) * torch.arange(x.shape[0])[:, None])


@shapes.forward(sequences)
def rows_in_zeros(self, x):
    state = torch.zeros(x.size(0), WIDTH)
    for t in range(x.size(1)):
        state = torch.tanh(self.lin(x[:, t]) + state)
    return self.out(state)


@shapes.forward()
def rows_in_ones_full_and_empty(self, x):
    ones = torch.ones((x.shape[0], 1))
    full = torch.full((x.shape[0], WIDTH), 0.5)
    return self.out(self.lin(x) * ones + full + torch.empty(len(x), WIDTH).fill_(2.0))


@shapes.forward()
def rows_in_eye_and_linspace(self, x):
    h = torch.eye(x.shape[0]) @ self.lin(x)
    return self.out(h * torch.linspace(0, 1, x.shape[0]).unsqueeze(1))


@shapes.forward(sequences)
def rows_times_steps(self, x):
    b, t, c = x.shape
    h = self.lin(x.reshape(b * t, c)).view(b, t, c)
    return self.out(h.reshape(b * t, -1)).view(b, t, -1)


@shapes.forward()
def half_of_the_rows(self, x):
    h = self.lin(x)
    k = int(x.shape[0] * 0.5)
    return self.out(torch.cat([h[:k].tanh(), h[k:].sin()]))


@shapes.forward()
def rows_divided_up(self, x):
    many, left = divmod(x.shape[0], 3)
    h = self.lin(x)
    return self.out(h) * many + left + math.ceil(x.shape[0] / 3)


@shapes.forward()
def rows_padded_to_four(self, x):
    h = F.pad(self.lin(x), (0, 0, 0, -x.shape[0] % 4))
    h = h.view(-1, 4, WIDTH).cumsum(1).flatten(0, 1)
    return self.out(h[: x.shape[0]])


@shapes.forward()
def contrastive(self, x):
    h = F.normalize(self.lin(x), dim=-1)
    labels = torch.arange(h.size(0), device=h.device)
    return F.cross_entropy(h @ h.T / 0.1, labels) + self.out(h)


@shapes.forward()
def all_pairs(self, x):
    n = len(x)
    h = self.lin(x)
    left, right = h.repeat_interleave(n, 0), h.repeat(n, 1)
    return self.out((left * right).view(n, n, -1).sum(1))


@shapes.forward()
def rows_reversed_by_lists(self, x):
    order = list(range(x.shape[0]))[::-1]
    h = self.lin(x)
    return self.out(h[order] + h[torch.arange(x.shape[0] - 1, -1, -1)] + h.roll(x.shape[0] // 2, 0))


@shapes.forward()
def sum_over_a_range(self, x):
    return self.out(self.lin(x)) * sum(range(x.shape[0])) + sum(1 for _ in x)


@shapes.forward(sequences)
def causal_mask_of_steps(self, x):
    t = x.shape[1]
    mask = torch.full((t, t), float("-inf")).triu(1)
    h = self.lin(x)
    return self.out((h @ h.transpose(1, 2) / math.sqrt(h.size(-1)) + mask).softmax(-1) @ h)


@shapes.model(tokens)
class PositionsOfSteps(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, WIDTH)
        self.pos = nn.Embedding(16, WIDTH)

    def forward(self, ids):
        rows, steps = ids.size()
        assert steps <= self.pos.num_embeddings, "too long"
        where = torch.arange(0, steps, dtype=torch.long, device=ids.device).unsqueeze(0).expand(rows, steps)
        return (self.emb(ids) + self.pos(where)) @ self.emb.weight.t()


@shapes.forward(tokens, parts={"emb": lambda: nn.Linear(11, WIDTH)})
def one_hot_of_sizes(self, ids):
    places = F.one_hot(torch.arange(ids.shape[0]) % ids.shape[1], num_classes=ids.shape[1]).float()
    return self.out((self.emb(F.one_hot(ids, 11).float()) * places[..., None]).sum(1))


@shapes.forward(images, parts={"conv": lambda: nn.Conv2d(3, 4, 3, stride=2), "mix": lambda: nn.Conv2d(3, 4, 1)})
def interpolate_to_a_size(self, x):
    h = F.interpolate(self.conv(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
    small = F.interpolate(self.mix(x), size=(x.shape[2] // 2, int(x.shape[3] * 0.5)))
    return h.mean((2, 3)) + small.flatten(1).mean(1, keepdim=True)


@shapes.forward(images, parts={"conv": lambda: nn.Conv2d(3, 4, 3)})
def pad_by_odd_sizes(self, x):
    h = self.conv(x)
    height, width = x.shape[2] - h.shape[2], x.shape[3] - h.shape[3]
    h = F.pad(h, [width // 2, width - width // 2, height // 2, height - height // 2])
    return torch.cat([x, h], 1)


@shapes.forward(images, parts={"mix": lambda: nn.Linear(12, 12)})
def windows(self, x):
    """Take windows apart and together again as Swin does, the rows by dividing their number."""
    b, c, h, w = x.shape
    parts = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4 * c)
    parts = self.mix(parts)
    rows = int(parts.shape[0] / (h * w / 2 / 2))
    return parts.view(rows, h // 2, w // 2, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(rows, c, h, w)


@shapes.forward(sequences)
def heads(self, x):
    b, t, _ = x.shape
    q = self.lin(x).view(b, t, 2, -1).transpose(1, 2)
    h = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    return self.out(h.transpose(1, 2).contiguous().view(b, t, -1))


@shapes.forward(lambda rows: (torch.randn(rows, 1, 1),))
def dimensions_of_one(self, x):
    return self.out(self.lin(x.squeeze().unsqueeze(-1).expand(-1, WIDTH)))


@shapes.forward()
def strides_and_layout(self, x):
    h = self.lin(x).t()
    if not h.is_contiguous():
        h = h.contiguous() * h.stride(0)
    return self.out(h.t()) * x.stride(0) + x.element_size()


@shapes.forward(features)
def truth_of_rows(self, x):
    h = self.lin(x) if x.shape[0] and x.is_floating_point() else x
    return self.out(h) if x.shape[0] != 7 else self.out(h.tanh())
