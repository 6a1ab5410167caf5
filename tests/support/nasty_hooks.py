"""Nasty models, kind ``hooks``: functions that are registered on layers and run around them."""

from __future__ import annotations

import torch
from nasty_base import WIDTH, Registry, Small
from torch import nn

hooks = Registry("hooks")


class Plain(Small):
    def __init__(self):
        super().__init__()
        self.seen = []
        self.mid = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.hook()

    def hook(self):
        """Register what the subclass is about."""

    def forward(self, x):
        return self.out(self.mid(self.lin(x)))


def looks(module, args, output):
    assert output.shape[0] == args[0].shape[0]


def doubles(module, args, output):
    return output * 2


def counts(module, args, output):
    module.calls = getattr(module, "calls", 0) + 1
    return output + module.calls


def appends(module, args, output):
    module.seen.append(output.detach().mean())
    return output + sum(module.seen)


def shifts_input(module, args):
    return (args[0] + 1,)


def shifts_with_kwargs(module, args, kwargs):
    return args, {**kwargs, "scale": 3.0}


def scales_result(module, args, kwargs, output):
    return output * kwargs["scale"]


def scales_gradient(module, grad_input, grad_output):
    return tuple(None if grad is None else grad * 0.5 for grad in grad_input)


def clips_gradient(module, grad_output):
    return tuple(grad.clamp(-0.1, 0.1) for grad in grad_output)


@hooks.model()
class Looks(Plain):
    def hook(self):
        self.lin.register_forward_hook(looks)
        self.mid.register_forward_hook(looks)


@hooks.model()
class ChangesResult(Plain):
    def hook(self):
        self.lin.register_forward_hook(doubles)
        self.mid.register_forward_hook(doubles)
        self.register_forward_hook(doubles)


@hooks.model()
class ChangesInput(Plain):
    def hook(self):
        self.lin.register_forward_pre_hook(shifts_input)
        self.register_forward_pre_hook(shifts_input)


@hooks.model()
class Counts(Plain):
    def hook(self):
        self.mid.register_forward_hook(counts)
        self.lin.register_forward_hook(counts)


@hooks.model()
class Appends(Plain):
    def hook(self):
        self.mid.seen = self.seen
        self.mid.register_forward_hook(appends)


@hooks.model()
class WithKeywords(Small):
    class Scale(nn.Module):
        def forward(self, x, *, scale=1.0):
            return x * scale

    def __init__(self):
        super().__init__()
        self.scale = self.Scale()
        self.scale.register_forward_pre_hook(shifts_with_kwargs, with_kwargs=True)
        self.scale.register_forward_hook(scales_result, with_kwargs=True, always_call=True)

    def forward(self, x):
        return self.out(self.scale(self.lin(x), scale=2.0))


@hooks.model()
class Backward(Plain):
    def hook(self):
        self.lin.register_full_backward_hook(scales_gradient)
        self.mid.register_full_backward_hook(scales_gradient)


@hooks.model()
class BackwardOfTheModel(Plain):
    def hook(self):
        self.register_full_backward_pre_hook(clips_gradient)
        self.mid.register_full_backward_pre_hook(clips_gradient)


@hooks.model()
class Extracts(Plain):
    """The hidden units are taken from a layer by a hook and returned too."""

    def keep(self, module, args, output):
        self.kept = output

    def hook(self):
        self.mid[0].register_forward_hook(self.keep)

    def forward(self, x):
        y = super().forward(x)
        return y, self.kept


@hooks.model()
class RegisteredInForward(Plain):
    def forward(self, x):
        handle = self.lin.register_forward_hook(doubles)
        try:
            return self.out(self.mid(self.lin(x)))
        finally:
            handle.remove()


@hooks.model()
class OnceOnly(Plain):
    """The hook takes itself away after the first call."""

    def first(self, module, args, output):
        self.handle.remove()
        return output * 10

    def hook(self):
        self.handle = self.mid.register_forward_hook(self.first)


@hooks.model()
class NoiseByHook(Plain):
    def hook(self):
        self.mid.register_forward_hook(lambda module, args, output: output + torch.rand_like(output) * module.training)


@hooks.model()
class GradientCheckedByHook(Plain):
    """A hook on the layer's result registers a hook on the tensor."""

    def hook(self):
        self.mid[0].register_forward_hook(
            lambda module, args, output: output.register_hook(lambda grad: grad * 2) and None
        )
