"""Results of a pipeline as part of the caller's autograd graph: ``loss.backward()`` runs the pipeline's backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import StageError


class Pending:
    """A forward whose backward may still come; when it can no longer come its activations are dropped."""

    def __init__(self, run_backward: Callable[[list[Any]], None], forget: Callable[[], None]) -> None:
        self._run_backward = run_backward
        self._forget = forget
        self._done = False

    def backward(self, gradients: list[Any]) -> None:
        """Run the backward, once."""
        if self._done:
            raise StageError("backward ran twice through one pipeline result; activations are freed by the first")
        self._done = True
        self._run_backward(gradients)

    def __del__(self) -> None:
        if not self._done:
            self._forget()


class _PipelineFunction(torch.autograd.Function):
    """Ties the pipeline's backward into the caller's autograd graph."""

    @staticmethod
    def forward(ctx: Any, pending: Pending, anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.pending = pending
        ctx.set_materialize_grads(False)
        outputs = tuple(tensor.view_as(tensor) for tensor in tensors)
        ctx.mark_non_differentiable(
            *[output for output in outputs if not (output.is_floating_point() or output.is_complex())]
        )
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[None, ...]:
        ctx.pending.backward(list(gradients))
        return (None, None, *[None for _ in gradients])


def attach(pending: Pending, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return ``tensors`` as results whose backward runs the pipeline's."""
    anchor = torch.zeros((), requires_grad=True)
    attached: tuple[torch.Tensor, ...] = _PipelineFunction.apply(pending, anchor, *tensors)  # type: ignore[no-untyped-call]
    return attached
