"""Nasty models, kind ``shapes``, continued: sizes become numbers, texts, keys and tensors."""

from __future__ import annotations

import math
import operator

import numpy as np
import torch
from nasty_base import WIDTH, sequences, two
from nasty_shapes import shapes


@shapes.forward()
def roots_of_sizes(self, x):
    return self.out(self.lin(x) / math.sqrt(x.shape[-1])) * math.sqrt(x.shape[0]) * x.shape[0] ** -0.5


@shapes.forward()
def one_by_rows(self, x):
    return self.out(self.lin(x)).sum(0, keepdim=True) * (1 / x.shape[0]) + self.out(x)


@shapes.forward()
def float_and_round_of_rows(self, x):
    return self.out(self.lin(x)) * float(x.shape[0]) + round(x.shape[0] / 3) + operator.index(x.shape[0])


@shapes.forward()
def counts_of_elements(self, x):
    h = self.lin(x)
    return self.out(h) / x.numel() + h.sum() / h.nelement() + x.shape.numel()


@shapes.forward()
def product_by_numpy(self, x):
    return self.out(self.lin(x)) / float(np.prod(x.shape)) * np.sqrt(x.shape[0])


@shapes.forward(sequences)
def size_sliced_and_joined(self, x):
    h = self.lin(x).view(x.shape[:-1] + (2, 3))  # noqa: RUF005
    return self.out(h.transpose(-1, -2).reshape(torch.Size([x.shape[0]]) + x.shape[1:]))


@shapes.forward(sequences)
def size_unpacked(self, x):
    rows, *rest, width = x.shape
    return self.out(self.lin(x).reshape(rows, *rest, width).flatten(0, -2)).unflatten(0, (rows, *rest))


@shapes.forward(two)
def sizes_compared(self, x, y):
    assert x.shape == y.shape and x.size()[1:] == (WIDTH,), f"{x.shape} and {y.shape}"  # noqa: PT018
    return self.out(self.lin(x) * y.view(x.size()))


@shapes.forward()
def size_as_a_key(self, x):
    scale = {"(6,)": 2.0, "(7,)": 3.0}[str(tuple(x.shape[1:]))]
    return self.out(self.lin(x) * scale)


@shapes.forward(parts={"scales": lambda: {4: 1.0}})
def rows_as_a_key(self, x):
    return self.out(self.lin(x) * self.scales.get(x.shape[0], 0.5))


@shapes.forward()
def size_as_a_tensor(self, x):
    rows = torch.tensor(x.shape)[0]
    return self.out(self.lin(x) * rows / torch.tensor([x.shape[0], 2.0]).sum())


@shapes.forward(sequences)
def negative_dims(self, x):
    h = self.lin(x).transpose(-2, -1).softmax(-1).mean(dim=(-1,))
    return self.out(h.view(x.shape[-3], -1))


@shapes.forward()
def split_by_rows(self, x):
    first, *others = torch.split(self.lin(x), max(1, x.shape[0] // 2))
    return self.out(torch.cat([*others, first]))
