"""Nasty models, kind ``control``: Python that decides without looking at data."""

from __future__ import annotations

import functools
import logging
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from nasty_base import WIDTH, Registry, Small, features, sequences
from torch import nn

control = Registry("control")
SETTINGS = {"activation": "tanh", "depth": 2}


class Flavour(Enum):
    SWEET = 1
    SOUR = 2


@dataclass
class Config:
    flavour: Flavour = Flavour.SOUR
    powers: list[int] = field(default_factory=lambda: [1, 2])
    bias: float | None = None


@control.forward()
def branch_on_dtype(self, x):
    h = self.lin(x.float() if x.dtype != torch.float32 else x)
    return self.out(h if h.dtype == self.lin.weight.dtype else h.double())


@control.forward(parts={"config": Config, "extra": lambda: None})
def branch_on_config(self, x):
    h = self.lin(x)
    if self.config.flavour is Flavour.SOUR:
        h = sum(h**p for p in self.config.powers)
    if self.config.bias is not None:
        h = h + self.config.bias
    return self.out(h) if self.extra is None else self.extra(h)


@control.forward(parts={"stages": lambda: nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Identity()])})
def branch_on_isinstance(self, x):
    h = self.lin(x)
    for stage in self.stages:
        if isinstance(stage, nn.Identity):
            continue
        h = stage(h) + x if isinstance(stage, nn.Linear) else stage(h)
    return self.out(h if isinstance(h, torch.Tensor) else x)


@control.forward()
def branch_on_global(self, x):
    h = self.lin(x)
    for _ in range(SETTINGS["depth"]):
        h = getattr(torch, SETTINGS["activation"])(h)
    return self.out(h)


@control.forward()
def match_statement(self, x):
    match (x.dim(), SETTINGS):
        case (2, {"activation": "tanh"}):
            h = self.lin(x).tanh()
        case _:
            h = self.lin(x)
    return self.out(h)


@control.forward()
def branch_on_device(self, x):
    h = self.lin(x)
    if x.device.type == "cuda" or x.is_cuda:
        h = h.half().float()
    return self.out(h.to(x.device) + (0 if x.is_meta else 1))


@control.forward()
def branch_on_requires_grad(self, x):
    h = self.lin(x)
    if h.requires_grad and not x.requires_grad and x.is_leaf and h.grad_fn is not None:
        h = h * 2
    return self.out(h)


@control.forward(parts={"act": lambda: functools.partial(F.leaky_relu, negative_slope=0.3)})
def partials(self, x):
    double = functools.partial(torch.mul, 2.0)
    return self.out(double(self.act(self.lin(x))))


@control.forward()
def lambdas_and_closures(self, x):
    scale = 3.0

    def inner(value):
        nonlocal scale
        scale += 1
        return value * scale

    steps = [inner, lambda value: value.tanh(), inner]
    return self.out(functools.reduce(lambda value, step: step(value), steps, self.lin(x)))


@control.forward(sequences)
def generators(self, x):
    def frames():
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = (state + self.lin(x[:, t])).tanh()
            received = yield state
            if received:
                return

    return self.out(torch.stack(list(frames()), 1))


@control.forward()
def recursion(self, x):
    def power(value, n):
        return value if n == 0 else power(self.lin(value).tanh(), n - 1)

    return self.out(power(x, 3))


@control.forward(parts={"layers": lambda: nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))})
def comprehensions(self, x):
    hidden = {i: layer(x) for i, layer in enumerate(self.layers) if i != 1}
    ordered = sorted(hidden.items(), key=lambda item: -item[0])
    return self.out(sum(value / (key + 1) for key, value in ordered) + max(map(len, ["ab", "c"])))


@control.forward(parts={"layers": lambda: nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))})
def break_and_else(self, x):
    for i, layer in enumerate(reversed(self.layers)):
        if i == 2:
            break
        x = layer(x).relu()
    else:
        x = x * 0
    while (i := i - 1) > 0:
        x = x + 1
    return self.out(x)


@contextmanager
def doubled(model):
    before = model.scale
    model.scale = 2.0
    try:
        yield model.scale
    finally:
        model.scale = before


@control.forward(parts={"scale": lambda: 1.0})
def own_context(self, x):
    h = self.lin(x) * self.scale
    with doubled(self) as scale, ExitStack() as stack:
        stack.callback(int)
        h = h.tanh() * self.scale * scale
    return self.out(h * self.scale)


@control.forward(parts={"verbose": lambda: True})
def prints_and_logs(self, x):
    h = self.lin(x)
    if self.verbose:
        print("hidden", tuple(h.shape))
        logging.getLogger(__name__).debug("hidden of %s", type(h).__name__)
    return self.out(h)


@control.forward()
def warns(self, x):
    if x.shape[1] != 7:
        warnings.warn("the width is not seven", stacklevel=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn("not seen", stacklevel=2)
    return self.out(self.lin(x))


@control.forward()
def asserts(self, x):
    assert x.ndim == 2 and x.shape[1] == WIDTH, f"expected (rows, {WIDTH}), got {tuple(x.shape)}"  # noqa: PT018
    torch._assert(x.shape[0] > 0, "no rows")
    return self.out(self.lin(x))


@control.forward()
def names_by_text(self, x):
    for name in ("lin", "relu", "out"):
        x = getattr(self, name)(x) if hasattr(self, name) else getattr(x, name)()
    return eval("x + 1") + vars(self).get("offset", 0)


@control.forward(parts={"bag": lambda: SimpleNamespace(scale=2.0, functions={"tanh": torch.tanh})})
def namespaces(self, x):
    return self.out(self.bag.functions["tanh"](self.lin(x)) * self.bag.scale)


@control.model()
class ForwardByName(Small):
    """The method that does the work is chosen by a string."""

    kind = "gated"

    def forward(self, x):
        return getattr(self, f"_{self.kind}")(x)

    def _gated(self, x):
        return self.out(self.lin(x) * torch.sigmoid(x))


@control.model(sequences)
class Beam(Small):
    """Tensors pass through a Python class with methods and operators."""

    class Pair:
        def __init__(self, a, b):
            self.a, self.b = a, b

        def __add__(self, other):
            return type(self)(self.a + other.a, self.b * other.b)

        def __iter__(self):
            return iter((self.a, self.b))

    def forward(self, x):
        total = self.Pair(x[:, 0], x[:, 1])
        for t in range(2, x.shape[1]):
            total = total + self.Pair(self.lin(x[:, t]), x[:, t].tanh())
        a, b = total
        return self.out(a + b)


@control.forward(features)
def cumulative_loop(self, x):
    history, total = [x], torch.zeros(())
    for i in range(4):
        history.append(self.lin(torch.stack(history).mean(0)).tanh())
        total = total + history[-1].pow(2).mean() / (i + 1)
    return self.out(torch.cat([history[-1], history.pop(1)])), total


@control.forward(features)
def iterates_to_a_fixed_count(self, x):
    z = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(3):
            z = torch.tanh(self.lin(z) + x)
    return self.out(torch.tanh(self.lin(z.detach().requires_grad_()) + x))
