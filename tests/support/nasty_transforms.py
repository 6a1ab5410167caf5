"""Nasty models, kind ``regions``, continued: gradients taken in forward, torch.func, scripts, and modes of torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nasty_base import WIDTH, Small, features, sequences
from nasty_regions import regions
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@regions.forward(lambda rows: (torch.randn(rows, WIDTH),))
def gradient_inside(self, x):
    """Forces are the gradient of an energy, and are trained on."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = self.out(self.lin(x).tanh()).sum(1)
        (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return energy, -forces


@regions.forward()
def gradient_step_inside(self, x):
    """One step of an inner optimisation, as in MAML."""
    weight = self.lin.weight
    with torch.enable_grad():
        inner = F.linear(x, weight).pow(2).mean()
        (grad,) = torch.autograd.grad(inner, weight, create_graph=True)
    return self.out(F.linear(x, weight - 0.1 * grad, self.lin.bias))


@regions.forward()
def vmapped(self, x):
    per_row = torch.func.vmap(lambda row: torch.outer(row, row).sum(0))
    return self.out(torch.vmap(self.lin)(x) + per_row(x))


@regions.forward()
def transforms(self, x):
    def energy(row):
        return self.lin(row).tanh().pow(2).sum()

    gradient = torch.func.vmap(torch.func.grad(energy))(x)
    _, tangent = torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))
    return self.out(gradient + tangent)


@regions.forward()
def functional_call(self, x):
    weights = {name: value * 0.5 for name, value in self.lin.named_parameters()}
    return self.out(torch.func.functional_call(self.lin, weights, (x,)))


@torch.jit.script
def scripted_gate(x: torch.Tensor, n: int) -> torch.Tensor:
    for i in range(n):
        x = x * torch.sigmoid(x) + i
    return x


@regions.forward()
def scripted_function(self, x):
    return self.out(scripted_gate(self.lin(x), 2))


def scripted() -> torch.jit.ScriptModule:
    return torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)))


@regions.forward(parts={"scripted": scripted}, copies=False)
def scripted_layer(self, x):
    return self.out(self.scripted(self.lin(x)))


def traced() -> torch.jit.ScriptModule:
    return torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.zeros(2, WIDTH))


@regions.forward(parts={"traced": traced}, copies=False)
def traced_layer(self, x):
    return self.out(self.traced(self.lin(x)))


@regions.forward()
def saved_tensors_changed(self, x):
    def pack(tensor):
        return tensor.to(torch.float16) if tensor.dtype == torch.float32 else tensor

    def unpack(tensor):
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        h = self.lin(x).tanh()
    return self.out(h)


@regions.forward()
def profiled(self, x):
    with torch.profiler.record_function("hidden"), torch.autograd.set_detect_anomaly(False):
        h = self.lin(x)
    return self.out(h)


@regions.forward()
def default_dtype_and_device(self, x):
    torch.set_default_dtype(torch.float64)
    try:
        offset = torch.ones(WIDTH)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        offset = offset + torch.zeros(WIDTH)
    return self.out((self.lin(x) + offset).float()), offset


class Sines(TorchFunctionMode):
    """While it is active, tanh is a sine."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.sin if func in (torch.tanh, torch.Tensor.tanh) else func
        return func(*args, **(kwargs or {}))


@regions.forward()
def function_mode(self, x):
    with Sines():
        h = self.lin(x).tanh()
    return self.out(h.tanh())


@regions.forward(sequences)
def kernel_chosen(self, x):
    h = self.lin(x).unsqueeze(1)
    with sdpa_kernel(SDPBackend.MATH):
        h = F.scaled_dot_product_attention(h, h, h, dropout_p=0.2 * self.training)
    return self.out(h.squeeze(1))


@regions.model(features)
class NotCompiled(Small):
    @torch.compiler.disable
    def body(self, x):
        return self.lin(x).tanh()

    def forward(self, x):
        return self.out(self.body(x) * (2 if torch.compiler.is_compiling() else 3))


@regions.forward(features)
def branch_on_tracing(self, x):
    h = self.lin(x)
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_exporting():
        h = h * 100
    if isinstance(x, torch.fx.Proxy) or type(x) is not torch.Tensor:
        h = h * 1000
    return self.out(h)


@regions.forward(features)
def inference_statistics(self, x):
    with torch.inference_mode():
        scale = float(self.lin(x).abs().max())
    return self.out(self.lin(x) / scale)
