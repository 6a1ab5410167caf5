"""Nasty models, kind ``modules``: how layers and parameters are kept, shared, wrapped and called."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from nasty_base import WIDTH, Registry, Small, tokens
from torch import nn

modules = Registry("modules")


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


@modules.model(tokens)
class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, WIDTH)
        self.mid = linear()
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.mid(self.emb(ids)).tanh())


@modules.model()
class SharedUnderTwoNames(Small):
    def __init__(self):
        super().__init__()
        self.again = self.lin
        self.stack = nn.ModuleList([self.lin, self.lin, linear()])

    def forward(self, x):
        for layer in self.stack:
            x = layer(x).tanh()
        return self.out(self.again(x) + self.lin(x))


@modules.forward(
    parts={
        "bias": lambda: nn.Parameter(torch.randn(WIDTH)),
        "many": lambda: nn.ParameterList([torch.randn(WIDTH) for _ in range(2)]),
        "named": lambda: nn.ParameterDict({"a": torch.randn(WIDTH, WIDTH), "b": torch.randn(WIDTH)}),
    }
)
def parameters_used_directly(self, x):
    h = self.lin(x) @ self.named["a"].t() + self.bias[:3].repeat(2)
    for parameter in self.many:
        h = h * parameter
    return self.out(h + sum(self.named.values()).sum(0)) + F.linear(x, self.out.weight)


@modules.forward(parts={"by_name": lambda: nn.ModuleDict({"relu": nn.ReLU(), "lin": linear()})})
def layers_by_name(self, x):
    for name, layer in self.by_name.items():
        x = layer(x) + len(name)
    for name, layer in self.named_children():
        if name == "lin":
            x = layer(x)
    return self.out(self._modules["lin"](x))


@modules.forward(parts={"stack": lambda: nn.Sequential(linear(), nn.Tanh(), linear(), nn.Tanh())})
def slices_of_a_stack(self, x):
    kept = {i: (x := layer(x)) for i, layer in enumerate(self.stack[:2])}
    return self.out(self.stack[2:](x) + self.stack[-1](kept[0]) + len(self.stack))


@modules.model()
class LayersInAPlainList(Small):
    """The layers are not registered: they are not parameters of the model, but they compute."""

    def __init__(self):
        super().__init__()
        self.hidden_layers = [linear().requires_grad_(False), torch.nn.Tanh()]
        self.functions = {"out": self.out}

    def forward(self, x):
        for layer in self.hidden_layers:
            x = layer(self.lin(x))
        return self.functions["out"](x)


@modules.model()
class PointerToTheParent(Small):
    class Child(nn.Module):
        def __init__(self, parent):
            super().__init__()
            self.parent = (parent,)

        def forward(self, x):
            return self.parent[0].lin(x).tanh()

    def __init__(self):
        super().__init__()
        self.child = self.Child(self)

    def forward(self, x):
        return self.out(self.child(self.child(x)))


@modules.model()
class OwnCall(Small):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 2

    def forward(self, x):
        return self.out(self.lin(x))


@modules.model()
class WrapperByGetattr(nn.Module):
    """Attributes that are not there are looked up in the wrapped model."""

    def __init__(self):
        super().__init__()
        self.module = Small()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x):
        return self.out(self.lin(x).tanh())


@modules.model()
class ForwardAssigned(Small):
    def __init__(self):
        super().__init__()
        self.lin.forward = functools.partial(F.linear, weight=self.out.weight.detach().clone().repeat(2, 1))

    def forward(self, x):
        return self._body(x)

    def _body(self, x):
        return self.out.forward(self.lin(x))


@modules.model()
class Inherited(Small):
    class Stack(nn.Sequential):
        def forward(self, x, scale=1.0):
            for layer in self:
                x = layer(x) * scale
            return super().forward(x)

    def __init__(self):
        super().__init__()
        self.stack = self.Stack(linear(), nn.Tanh())

    def forward(self, x):
        return self.out(self.stack(self.lin(x), scale=0.5))


@modules.model()
class FrozenAndUnused(Small):
    def __init__(self):
        super().__init__()
        self.lin.weight.requires_grad_(False)
        self.unused = linear()
        self.gap = None
        self.register_buffer("missing", None)
        self.register_parameter("no_bias", None)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x):
        if self.missing is None and self.no_bias is None:
            x = x * self.scale
        return self.out(self.lin(x).tanh())


@modules.model()
class Materialised(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))
        self.stack(torch.zeros(2, WIDTH))

    def forward(self, x):
        return self.stack(x)
