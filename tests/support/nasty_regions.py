"""Nasty models, kind ``regions``: grad modes, autocast, autograd of one's own, recomputing, transforms, compilers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nasty_base import WIDTH, Registry, Small
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

regions = Registry("regions")


@regions.forward()
def autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = self.lin(x)
        with torch.autocast("cpu", enabled=False):
            h = self.lin(h.float() + x)
        y = self.out(h)
    return y, self.out(x)


@regions.model()
class AutocastDecorated(Small):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return self.out(self.lin(x).softmax(-1)).float()


@regions.forward()
def no_grad(self, x):
    with torch.no_grad():
        target = self.lin(x).softmax(-1)
        with torch.enable_grad():
            h = self.lin(x)
    return self.out(h + target)


@regions.model()
class NoGradDecorated(Small):
    @torch.no_grad()
    def target(self, x):
        return self.lin(x).tanh()

    @torch.set_grad_enabled(False)
    def scale(self, x):
        return self.lin(x).abs().amax()

    def forward(self, x):
        return self.out(self.lin(x) * self.target(x) / self.scale(x))


@regions.forward()
def grad_mode_set_and_reset(self, x):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    fixed = self.lin(x)
    torch.set_grad_enabled(before)
    return self.out(self.lin(x) + fixed)


@regions.forward()
def detached(self, x):
    h = self.lin(x)
    return self.out(h + h.detach() * 2), F.mse_loss(h, self.lin(x.detach()).detach() + 1)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.factor * grad, None


class Sharp(torch.autograd.Function):
    """Forward is a step, backward that of a smooth function; saves tensors and gives two results."""

    @staticmethod
    def forward(ctx, x, kind="step", *, slope=2.0):
        ctx.save_for_backward(x)
        ctx.slope = slope
        step = (x > 0).to(x.dtype)
        count = step.sum(1).long()
        ctx.mark_non_differentiable(count)
        return step, x * 2, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_step, grad_double, _):
        (x,) = ctx.saved_tensors
        return grad_step * ctx.slope / (1 + x.abs()) ** 2 + 2 * grad_double, None


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] * grad if ctx.needs_input_grad[0] else None


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 5


class NoisyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 0.1 * torch.randn_like(grad))


@regions.forward()
def reversed_gradient(self, x):
    return self.out(Reverse.apply(self.lin(x), 0.5))


@regions.forward()
def function_with_many_results(self, x):
    step, double, count = Sharp.apply(self.lin(x))
    return self.out(step + double), count


@regions.forward()
def function_with_setup_context(self, x):
    return self.out(Square.apply(self.lin(x)))


@regions.forward()
def function_in_place(self, x):
    h = self.lin(x) + 0
    Doubled.apply(h)
    return self.out(h)


@regions.forward()
def function_with_random_backward(self, x):
    return self.out(NoisyGradient.apply(self.lin(x)))


@regions.model()
class Checkpointed(Small):
    """A part is computed again in backward, with the same dropout."""

    reentrant = False

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def body(self, x, scale):
        return self.drop(self.lin(x).tanh()) * scale

    def forward(self, x):
        h = checkpoint(self.body, self.lin(x), 2.0, use_reentrant=self.reentrant)
        return self.out(h)


@regions.model()
class CheckpointedReentrant(Checkpointed):
    reentrant = True


@regions.forward(parts={"stack": lambda: nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)], nn.Dropout(0.3))})
def checkpointed_stack(self, x):
    if self.training:
        return self.out(checkpoint_sequential(self.stack, 2, self.lin(x), use_reentrant=False))
    return self.out(self.stack(self.lin(x)))


@regions.forward()
def tensor_hook(self, x):
    h = self.lin(x)
    if h.requires_grad:
        h.register_hook(lambda grad: grad.clamp(-0.1, 0.1) * 3)
        h.retain_grad()
    return self.out(h)
