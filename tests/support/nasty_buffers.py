"""Nasty models, kind ``state``, continued: buffers that forward changes."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from nasty_base import WIDTH, Small, features, images
from nasty_state import state
from torch import nn


@state.forward(buffers={"n": lambda: torch.zeros(())})
def buffer_in_place(self, x):
    self.n += 1
    return self.out(self.lin(x) * self.n)


@state.forward(buffers={"n": lambda: torch.zeros((), dtype=torch.long)})
def buffer_add_by_method(self, x):
    if self.training:
        self.n.add_(1)
    return self.out(self.lin(x) / (self.n + 1))


@state.forward(buffers={"n": lambda: torch.zeros(1)})
def buffer_replaced(self, x):
    self.n = self.n + 1
    return self.out(self.lin(x) + self.n)


@state.forward(buffers={"n": lambda: torch.zeros(2)})
def buffer_by_data_and_copy(self, x):
    self.n.data = self.n.data * 0.5 + 1
    self.n.copy_(self.n + x.mean())
    self.n[0] = x.max()
    return self.out(self.lin(x) + self.n.sum())


@state.forward(buffers={"mean": lambda: torch.zeros(WIDTH)})
def moving_average(self, x):
    h = self.lin(x)
    if self.training:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return self.out(h - self.mean)


@state.forward(buffers={"mean": lambda: torch.zeros(WIDTH), "ready": lambda: torch.tensor(False)})
def moving_average_started_by_data(self, x):
    h = self.lin(x)
    if self.training:
        now = h.detach().mean(0)
        self.mean = now if not self.ready else torch.lerp(self.mean, now, 0.1)
        self.ready.fill_(True)
    return self.out(h - self.mean)


@state.model()
class TeacherOfWeights(Small):
    """A frozen copy of a layer follows it slowly, in forward."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.teacher.parameters(), self.lin.parameters()):
                    slow.lerp_(fast, 0.2)
        with torch.no_grad():
            target = self.teacher(x)
        return self.out(self.lin(x)), F.mse_loss(self.lin(x), target)


@state.model()
class Queue(Small):
    """A ring of negatives, as in momentum contrast; the place is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.randn(12, WIDTH))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def push(self, keys):
        start = int(self.place)
        where = (torch.arange(len(keys)) + start) % len(self.queue)
        self.queue[where] = keys
        self.place[0] = (start + len(keys)) % len(self.queue)

    def forward(self, x):
        h = F.normalize(self.lin(x), dim=1)
        logits = h @ self.queue.clone().t()
        if self.training:
            self.push(h)
        return logits, self.out(h)


@state.model()
class Codebook(Small):
    """Vector quantisation whose codes are moving averages."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(5, WIDTH))
        self.register_buffer("sizes", torch.ones(5))

    def forward(self, x):
        h = self.lin(x)
        near = F.one_hot(torch.cdist(h, self.codes).argmin(1), 5).type_as(h)
        picked = near @ self.codes
        if self.training:
            self.sizes.data.mul_(0.9).add_(near.sum(0), alpha=0.1)
            self.codes.data.copy_(0.9 * self.codes + 0.1 * (near.t() @ h) / self.sizes[:, None])
        return self.out(h + (picked - h).detach())


for name, make, args, width in (
    ("BatchNorm1d", lambda: nn.BatchNorm1d(WIDTH), features, WIDTH),
    ("BatchNormWithoutMomentum", lambda: nn.BatchNorm1d(WIDTH, momentum=None), features, WIDTH),
    ("BatchNormWithoutStatistics", lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False), features, WIDTH),
    ("BatchNorm2d", lambda: nn.BatchNorm2d(3), images, 192),
    ("InstanceNormTracked", lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), images, 192),
):
    layers = functools.partial(lambda make, width: [make(), nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)], make, width)
    state.add(name, lambda layers=layers: nn.Sequential(*layers()), args)


@state.forward(parts={"bn": lambda: nn.BatchNorm1d(WIDTH)})
def batchnorm_twice(self, x):
    return self.out(self.bn(self.lin(self.bn(x))))
