"""What runs an op at the least cost beside its arithmetic.

An op of ``torch.ops`` reads its arguments by a schema, and they pass through a stack. The functions and methods that
Python code calls have a parser of their own each: 1 to 2 µs less for each call, of 2 to 11 that a small op takes, and
the same kernel in the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_aten, _nn = torch.ops.aten, torch._C._nn
# By overload: what takes the same arguments in the same order, and means that overload with them.
_PYTHON: dict[Any, Any] = {
    _aten.linear.default: _nn.linear,
    _aten.addmm.default: torch.addmm,
    _aten.mm.default: torch.mm,
    _aten.bmm.default: torch.bmm,
    _aten.mv.default: torch.mv,
    _aten.convolution.default: torch.convolution,
    _aten.native_layer_norm.default: torch.native_layer_norm,
    _aten.native_batch_norm.default: torch.native_batch_norm,
    _aten.t.default: torch.t,
    _aten.transpose.int: torch.transpose,
    _aten.permute.default: torch.permute,
    _aten.view.default: torch.Tensor.view,
    _aten.expand.default: torch.Tensor.expand,
    _aten.select.int: torch.select,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.squeeze.dim: torch.squeeze,
    _aten.clone.default: torch.clone,
    _aten.detach.default: torch.detach,
    _aten.add.Tensor: torch.add,
    _aten.add_.Tensor: torch.Tensor.add_,
    _aten.mul.Tensor: torch.mul,
    _aten.mul_.Tensor: torch.Tensor.mul_,
    _aten.sub.Tensor: torch.sub,
    _aten.sub_.Tensor: torch.Tensor.sub_,
    _aten.div.Tensor: torch.div,
    _aten.div_.Tensor: torch.Tensor.div_,
    _aten.neg.default: torch.neg,
    _aten.neg_.default: torch.Tensor.neg_,
    _aten.sum.dim_IntList: torch.sum,
    _aten.relu.default: torch.relu,
    _aten.relu_.default: torch.relu_,
    _aten.gelu.default: _nn.gelu,
    _aten.silu.default: _nn.silu,
    _aten.tanh.default: torch.tanh,
    _aten.tanh_.default: torch.tanh_,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.sigmoid_.default: torch.sigmoid_,
}


def entry(target: Any) -> Any:
    """Return what to call for ``target``: a function or method of Python, an op's C++ entry, or itself."""
    if target in _PYTHON:
        return _PYTHON[target]
    return getattr(target, "_op", target) if isinstance(target, torch._ops.OpOverload) else target


@contextlib.contextmanager
def below_autograd() -> Iterator[None]:
    """Run ops where they were recorded: below autograd, whose layer of each would only find that it has nothing to do.

    With ops of a few microseconds, that layer takes 4 to 7 % of a stage.
    """
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        yield
