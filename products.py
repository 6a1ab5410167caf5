"""Matrix products of 32-bit floats on CPUs by oneDNN (https://github.com/uxlfoundation/oneDNN) instead of the BLAS.

PyTorch's builds for x86 multiply by MKL, which uses AVX-512 on Intel's processors only; oneDNN, which is in the same
builds for convolutions, uses what the processor has. On an AMD EPYC of family 26 a thread multiplies at 210 GFLOP/s by
oneDNN and at 100 by MKL (benchmarks/matrix_products.py). Both sum a row in an order of their own, so results differ by
rounding. PyTorch itself has no setting for that: its dispatch to oneDNN in products is for lower precisions. The op
here is what Inductor calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_aten = torch.ops.aten

_LEAST = 1 << 21  # multiplications of a product: a smaller one takes less time by BLAS, whose call costs less


def why_no_onednn() -> str | None:
    """Say why this build of torch cannot multiply by oneDNN; None if it can."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this build of torch has no oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"torch {torch.__version__} has no op for linear layers by oneDNN"
    return None


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply two matrices."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(left, right.t(), None, "none", [], "")
    return result


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply a matrix of rows with the transposed weight (outputs × inputs), and add the bias to every row."""
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()  # the op takes its elements for neighbours
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    return result


def added_product(bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply two matrices, and add a vector to every row."""
    return linear(left, right.t(), bias)


PRODUCTS = (product, linear, added_product)


def by_onednn(target: Any, arguments: Sequence[Any]) -> Callable[..., torch.Tensor] | None:
    """Return what computes an ATen op by oneDNN from the same arguments; None where that is not for oneDNN."""
    known = (target, len(arguments))
    if known == (_aten.mm.default, 2):
        left, right = arguments
        return product if _is_large(left, right) else None
    if known == (_aten.addmm.default, 3):
        bias, left, right = arguments
        return added_product if _is_large(left, right) and _is_row(bias, right.shape[1]) else None
    if known in ((_aten.linear.default, 2), (_aten.linear.default, 3)):
        rows, weight, *given = arguments
        fits = all(bias is None or _is_row(bias, weight.shape[0]) for bias in given)
        return linear if fits and weight.dim() == 2 and _is_large(rows, weight.t()) else None
    return None


def _is_large(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Say whether two factors are matrices that oneDNN multiplies sooner."""
    both = all(m.dim() == 2 and m.dtype == torch.float32 and m.device.type == "cpu" for m in (left, right))
    return both and left.shape[0] * left.shape[1] * right.shape[1] >= _LEAST


def _is_row(bias: torch.Tensor, n_columns: int) -> bool:
    """Say whether a bias has one 32-bit float for each column; addmm takes any that can be expanded to the result."""
    return tuple(bias.shape) == (n_columns,) and bias.dtype == torch.float32
