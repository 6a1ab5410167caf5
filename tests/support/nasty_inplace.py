"""Nasty models, kinds ``inplace`` and ``layout``: writing into tensors, views of them, strides and dtypes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from nasty_base import WIDTH, Registry, features, images, sequences
from torch import nn

inplace = Registry("inplace")
layout = Registry("layout")


@inplace.forward()
def methods(self, x):
    h = self.lin(x)
    h.add_(1).mul_(0.5).clamp_(-1, 1)
    h.neg_()
    return self.out(h.sigmoid_())


@inplace.forward()
def augmented_assignment(self, x):
    h = self.lin(x)
    kept = h
    h += x
    h *= 2
    h -= h.mean()
    h /= 3
    return self.out(h) + kept.sum()


@inplace.forward()
def column_assigned(self, x):
    h = self.lin(x)
    h[:, 0] = x[:, 1]
    h[..., -1] = 0.0
    h[:, 1:3] *= 2
    return self.out(h)


@inplace.forward()
def rows_assigned_one_by_one(self, x):
    result = torch.zeros(x.shape[0], WIDTH)
    for i in range(x.shape[0]):
        result[i] = self.lin(x[i]) * i
    return self.out(result)


@inplace.forward(sequences)
def steps_filled(self, x):
    result = torch.empty_like(x)
    for t in range(x.shape[1]):
        result[:, t] = self.lin(x[:, t]) + (result[:, t - 1] if t else 0.0)
    return self.out(result)


@inplace.forward()
def masked_and_indexed(self, x):
    h = self.lin(x)
    h.masked_fill_(x > 1, -1.0)
    h[x < -1] = 0.5
    h.index_put_((torch.arange(x.shape[0]), torch.arange(x.shape[0]) % WIDTH), x[:, 0])
    return self.out(h.index_fill_(1, torch.tensor([2]), 3.0))


@inplace.forward()
def relu_in_place(self, x):
    h = F.dropout(self.lin(x), 0.3, self.training, inplace=True)
    return self.out(F.relu(h, inplace=True) + self.lin(x).relu_())


@inplace.forward(parts={"stack": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2, True), nn.ReLU(True))})
def layers_in_place(self, x):
    kept = self.lin(x)
    return self.out(self.stack(kept) + F.relu_(kept + 1))


@inplace.forward(sequences)
def through_views(self, x):
    h = self.lin(x)
    h[:, 1:].add_(h[:, :1].detach())
    h.view(-1, WIDTH)[0].zero_()
    h.transpose(1, 2)[:, 0] *= 3
    h.select(1, 0).copy_(x[:, 0])
    return self.out(h)


@inplace.forward()
def base_after_view(self, x):
    h = self.lin(x) * 1
    left, flat = h[:, :3], h.view(-1)
    h.mul_(2)
    left += 1
    return self.out(h) + flat.sum() + left.mean()


@inplace.forward()
def scattered(self, x):
    h = self.lin(x)
    where = x.argsort(1)
    result = torch.zeros_like(h).scatter_add_(1, where, h)
    result.index_add_(0, torch.zeros(x.shape[0], dtype=torch.long), h, alpha=0.5)
    return self.out(result.scatter_(1, where[:, :1], 2.0))


@inplace.forward()
def given_out(self, x):
    with torch.no_grad():
        room = torch.empty(x.shape[0], WIDTH)
        torch.mul(x, 2.0, out=room)
        torch.add(room, 1.0, out=room)
    return self.out(self.lin(x) * room)


@inplace.forward()
def swapped_columns(self, x):
    h = self.lin(x).clone()
    h[:, 0], h[:, 1] = h[:, 1].clone(), h[:, 0].clone()
    h[:, [2, 3]] = h[:, [3, 2]]
    return self.out(h)


@inplace.forward()
def on_the_input(self, x):
    x += 1
    x[:, 0] = 0
    return self.out(self.lin(x))


@inplace.forward()
def in_helpers_and_lists(self, x):
    def shift(value, by):
        value.add_(by)

    parts = [part.clone() for part in self.lin(x).chunk(2, dim=1)]
    for i, part in enumerate(parts):
        shift(part, i + 1)
    parts[0] += parts[1]
    torch._foreach_mul_(parts, 2.0)
    return self.out(torch.cat(parts, 1))


@inplace.forward()
def shapes_in_place(self, x):
    h = self.lin(x).unsqueeze_(1).squeeze_(1)
    h = h.t_().clone()
    return self.out(h.t_())


@inplace.forward()
def data_and_detached(self, x):
    h = self.lin(x)
    h.data.clamp_(-0.5, 0.5)
    h.detach().mul_(2)
    return self.out(h)


@inplace.forward()
def row_by_cumulation(self, x):
    h = self.lin(x)
    total = torch.zeros_like(h[0])
    for row in h:
        total += row.tanh()
    return self.out(h + total)


@layout.forward()
def not_contiguous(self, x):
    h = self.lin(x).t()[:, ::2].t()
    return self.out(h) + self.out(h.contiguous()).flip(0)


@layout.forward(images, parts={"conv": lambda: nn.Conv2d(3, 4, 3, padding=1)})
def channels_last(self, x):
    h = self.conv(x.to(memory_format=torch.channels_last))
    if h.is_contiguous(memory_format=torch.channels_last):
        h = h * 2
    return h.permute(0, 2, 3, 1).contiguous(memory_format=torch.contiguous_format).flatten(1)


@layout.forward()
def expanded_and_broadcast(self, x):
    h = self.lin(x)[:, None, :].expand(-1, 4, -1)
    return self.out(h + torch.broadcast_to(x[:, :1, None], h.shape).expand_as(h))


@layout.forward(features, other_rows=False)
def strided(self, x):
    h = torch.as_strided(self.lin(x).contiguous(), (4, 3, 2), (WIDTH, 1, 2))
    return self.out(h.flatten(1))


@layout.forward(sequences)
def unfolded(self, x):
    h = self.lin(x).unfold(1, 3, 1)
    return self.out(h.mean(-1)), torch.diag_embed(x[:, 0])


@layout.forward(sequences)
def fourier(self, x):
    h = torch.fft.rfft(self.lin(x), dim=1)
    gain = torch.view_as_complex(torch.stack([torch.ones(h.shape[1:]), torch.zeros(h.shape[1:])], -1))
    return self.out(torch.fft.irfft(h * gain, n=x.shape[1], dim=1)), h.abs()


@layout.forward(sequences)
def rotary(self, x):
    angles = torch.outer(torch.arange(x.shape[1]).float(), 1.0 / 10 ** (torch.arange(0, WIDTH, 2) / WIDTH))
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(self.lin(x).float().reshape(*x.shape[:-1], -1, 2))
    return self.out(torch.view_as_real(pairs * turn).flatten(-2).type_as(x))


@layout.forward()
def cast_to_and_fro(self, x):
    h = self.lin(x).to(torch.bfloat16)
    h = (h * 2).half().float() + h.type_as(x)
    return self.out(h.double().to(self.out.weight)).to(torch.float16)


@layout.forward()
def whole_numbers_and_truth(self, x):
    level = (x * 4).round().int()
    even = (level % 2 == 0) & ~(level > 3) | (level < -3)
    return self.out(self.lin(x) * even + level.float() * (level // 2)), even.sum(), level.bool()


@layout.forward()
def bits_seen_as_numbers(self, x):
    return self.out(self.lin(x)) + (x.detach().view(torch.int32) & 7).float().mean(1, keepdim=True)


@layout.forward()
def einsums(self, x):
    h = torch.einsum("bi,oi->bo", self.lin(x), self.lin.weight)
    pair = torch.einsum("bi,bj->bij", h, x)
    return self.out(torch.einsum("bij,bj->bi", pair, x)) + torch.tensordot(h, self.out.weight, dims=([1], [1]))


@layout.forward(images)
def rearranged(self, x):
    b, c, h, w = x.shape
    patches = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * 16)
    return self.out(self.lin(patches[..., :WIDTH]).movedim(1, 0)).swapaxes(0, 1)


@layout.forward()
def sparse_product(self, x):
    n = x.shape[0]
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    graph = torch.sparse_coo_tensor(ring, torch.ones(n), (n, n))
    return self.out(torch.sparse.mm(graph, self.lin(x)))


@layout.forward(sequences)
def linear_algebra(self, x):
    h = self.lin(x)
    gram = h.transpose(1, 2) @ h + torch.eye(WIDTH)
    root = torch.linalg.cholesky(gram)
    return self.out(torch.linalg.solve(gram, x.transpose(1, 2)).transpose(1, 2)), root, torch.logdet(gram)


@layout.forward()
def made_in_forward(self, x):
    h = self.lin(x) + x.new_zeros(x.shape) + torch.ones_like(x) + torch.zeros_like(x, dtype=torch.float64).float()
    h = h * x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) + torch.tensor([0.5] * WIDTH, device=x.device)
    h = h + torch.as_tensor(np.linspace(0, 1, WIDTH), dtype=x.dtype) + torch.from_numpy(np.ones(1, np.float32))
    h = h + torch.full((), 3.0) + torch.scalar_tensor(2.0) + x.new_full((1,), 0.5)
    return self.out(h + torch.arange(x.size(1), device=x.device) + torch.tril(torch.ones(WIDTH, WIDTH)).sum(0))


@layout.forward()
def sorted_and_gathered(self, x):
    h, order = self.lin(x).sort(dim=1, descending=True)
    values, _ = h.cummax(1)
    result = torch.take_along_dim(x, order, 1) + values.logcumsumexp(1) + h.kthvalue(2, 1, keepdim=True).values
    return self.out(result), torch.aminmax(h), order.dtype


@layout.forward(images, parts={"theta": lambda: nn.Linear(192, 6)})
def sampled_by_grid(self, x):
    theta = self.theta(x.flatten(1)).view(-1, 2, 3)
    grid = F.affine_grid(theta, x.size(), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


@layout.forward()
def rounded_straight_through(self, x):
    h = self.lin(x)
    scale = h.detach().abs().amax(1, keepdim=True) / 7
    return self.out(h + ((h / scale).round() * scale - h).detach()), torch.fake_quantize_per_tensor_affine(
        h, 0.1, 0, -8, 7
    )
