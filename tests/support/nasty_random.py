"""Nasty models, kinds ``random`` and ``modes``: drawn numbers, and what training and evaluation do differently."""

from __future__ import annotations

import os
import random
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from nasty_base import STEPS, WIDTH, Registry, Small, images, sequences
from torch import nn

drawn = Registry("random")
modes = Registry("modes")


@drawn.forward(parts={"drop": lambda: nn.Dropout(0.4)})
def dropout_of_every_form(self, x):
    h = F.dropout(self.lin(x), 0.3, training=self.training)
    h = torch.dropout(h, 0.2, self.training)
    return self.out(self.drop(F.dropout(h, 0.5)))


@drawn.forward(images, parts={"drop": lambda: nn.Dropout2d(0.5), "conv": lambda: nn.Conv2d(3, 4, 3)})
def dropout_of_channels(self, x):
    return F.alpha_dropout(F.rrelu(self.drop(self.conv(x)), training=self.training), 0.2, self.training)


@drawn.forward()
def noise_added(self, x):
    h = self.lin(x)
    return self.out(h + torch.randn_like(h) * 0.1 + torch.rand(x.shape[0], 1) + torch.randn(WIDTH))


@drawn.forward()
def noise_in_place(self, x):
    noise = torch.empty_like(x).uniform_(-1, 1) + torch.zeros(x.shape).normal_().exponential_()
    return self.out(self.lin(x) + noise)


@drawn.forward()
def rows_shuffled(self, x):
    order = torch.randperm(x.shape[0], device=x.device)
    return self.out(torch.lerp(self.lin(x), x[order], 0.3))


@drawn.forward()
def bernoulli_and_multinomial(self, x):
    h = self.lin(x)
    mask = torch.bernoulli(torch.full_like(h, 0.5))
    picked = torch.multinomial(h.softmax(-1), 2)
    return self.out(h * mask) + h.gather(1, picked).sum(1, keepdim=True) + torch.randint(0, 9, (1,))


@drawn.forward()
def gumbel_and_distributions(self, x):
    h = F.gumbel_softmax(self.lin(x), tau=0.5, hard=True)
    normal = torch.distributions.Normal(self.lin(x), 1.0)
    return self.out(h + normal.rsample()), normal.log_prob(x)


@drawn.forward(sequences)
def attention_dropout(self, x):
    h = self.lin(x)
    return self.out(F.scaled_dot_product_attention(h, h, h, dropout_p=0.3 if self.training else 0.0))


@drawn.forward(sequences, parts={"mha": lambda: nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)})
def attention_module_dropout(self, x):
    return self.out(self.mha(x, x, x, need_weights=False)[0])


@drawn.forward(sequences)
def one_mask_for_all_steps(self, x):
    mask = torch.bernoulli(x.new_full((x.size(0), 1, x.size(2)), 0.7)) / 0.7 if self.training else 1.0
    return self.out(self.lin(x) * mask)


@drawn.forward()
def drop_path(self, x):
    h = self.lin(x)
    if self.training:
        keep = h.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.6)
        h = h * keep.div_(0.6)
    return self.out(x + h)


@drawn.model()
class LayerDrop(Small):
    """Leave layers out in training, as torch draws."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def skips(self):
        return torch.rand(1).item() < 0.5

    def forward(self, x):
        for layer in self.layers:
            if self.training and self.skips():
                continue
            x = layer(x).tanh()
        return self.out(x)


@drawn.model()
class LayerDropByPython(LayerDrop):
    def skips(self):
        return random.random() < 0.5


@drawn.model()
class LayerDropByNumpy(LayerDrop):
    def skips(self):
        return np.random.uniform(0, 1) < 0.5


@drawn.model()
class LayerDropByTensor(LayerDrop):
    def skips(self):
        return torch.rand(()) < 0.5


@drawn.forward()
def python_numbers(self, x):
    h = self.lin(x) * random.gauss(1, 0.2)
    return self.out(h + random.choice([1.0, 2.0, 3.0]))


@drawn.forward()
def numpy_numbers(self, x):
    lam = np.random.beta(0.5, 0.5)
    noise = torch.from_numpy(np.random.randn(*x.shape).astype(np.float32))
    return self.out(lam * self.lin(x) + (1 - lam) * x.flip(0) + noise)


@drawn.forward(sequences)
def random_crop(self, x):
    start = random.randrange(STEPS - 2)
    width = int(torch.randint(1, 3, ()))
    return self.out(self.lin(x[:, start : start + width]).mean(1))


@drawn.forward()
def random_order_of_layers(self, x):
    layers = [self.lin, torch.tanh, torch.sin]
    random.shuffle(layers)
    for layer in layers:
        x = layer(x)
    return self.out(x)


@drawn.forward()
def seeds_inside(self, x):
    h = self.lin(x) + torch.rand(1)
    torch.manual_seed(3)
    return self.out(h + torch.randn_like(h))


@drawn.forward()
def forked_inside(self, x):
    h = self.lin(x)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        h = h + torch.randn_like(h)
    return self.out(h * torch.rand_like(h))


@drawn.forward()
def generator_inside(self, x):
    generator = torch.Generator(device=x.device).manual_seed(11)
    projection = torch.randn(WIDTH, WIDTH, generator=generator)
    return self.out(self.lin(x) @ projection + torch.rand(1, generator=generator))


@drawn.forward(parts={"rng": lambda: torch.Generator().manual_seed(1)})
def generator_of_the_model(self, x):
    return self.out(self.lin(x) + torch.randn(x.shape, generator=self.rng))


@drawn.forward(parts={"rng": lambda: random.Random(1), "np_rng": lambda: np.random.default_rng(2)})
def python_generators_of_the_model(self, x):
    return self.out(self.lin(x) * self.rng.random() + float(self.np_rng.normal()))


@drawn.forward()
def seed_from_data(self, x):
    generator = torch.Generator().manual_seed(int(x.abs().sum() * 100))
    return self.out(self.lin(x) + torch.randn(x.shape, generator=generator))


@drawn.forward(deterministic=False)
def noise_from_the_clock(self, x):
    return self.out(self.lin(x)) + time.perf_counter_ns() % 1000003


@drawn.forward(deterministic=False)
def noise_from_the_system(self, x):
    return self.out(self.lin(x)) + int.from_bytes(os.urandom(3), "big") / 1e3 + random.SystemRandom().random()


@drawn.forward(parts={"seconds": lambda: 0.0})
def time_measured(self, x):
    started = time.perf_counter()
    h = self.lin(x)
    self.seconds += time.perf_counter() - started
    return self.out(h if self.seconds >= 0 else x)


class Answer(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


@modes.forward()
def named_tuple_only_in_training(self, x):
    h = self.lin(x)
    return Answer(self.out(h), h) if self.training else self.out(h)


@modes.forward(parts={"aux": lambda: nn.Linear(WIDTH, 2)})
def auxiliary_head(self, x):
    h = self.lin(x).tanh()
    result = {"out": self.out(h)}
    if self.training:
        result["aux"] = self.aux(h)
    return result


@modes.forward()
def labels_only_in_evaluation(self, x):
    logits = self.out(self.lin(x))
    return logits if self.training else (logits.softmax(-1), logits.argmax(-1))


@modes.forward()
def other_ops_in_evaluation(self, x):
    h = self.lin(x)
    if not self.training:
        h = h.sigmoid() * 2
        h = h - h.mean(0)
    return self.out(h)


@modes.forward()
def no_gradient_in_evaluation(self, x):
    with torch.set_grad_enabled(self.training):
        h = self.lin(x).tanh()
    return self.out(h)


@modes.forward(parts={"bn": lambda: nn.BatchNorm1d(WIDTH)})
def batchnorm_switched_in_forward(self, x):
    was = self.bn.training
    self.bn.eval()
    h = self.bn(self.lin(x))
    self.bn.train(was)
    return self.out(h + self.bn(h))


@modes.model()
class FrozenBatchNorm(Small):
    """``train`` is overridden: the normalisation never leaves evaluation."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH)
        self.bn.running_mean.uniform_()

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x):
        return self.out(self.bn(self.lin(x)))


@modes.forward()
def mode_of_a_layer_asked(self, x):
    h = self.lin(x)
    return self.out(h * 2 if self.lin.training and torch.is_grad_enabled() else h)


@modes.forward(parts={"bn": lambda: nn.BatchNorm1d(WIDTH)})
def functional_batchnorm(self, x):
    bn = self.bn
    h = F.batch_norm(self.lin(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.2)
    return self.out(h)
