"""Where weight gradients go: a sink takes each as soon as it is computed, while it is in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Arm = Callable[[list[torch.Tensor]], None]


class Sink(Protocol):
    """Takes gradients of the weights that it was made for, by number; each at most once."""

    def add(self, index: int, gradient: torch.Tensor) -> None:
        """Add a gradient."""

    def add_product(self, index: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add a matrix product that is a gradient: what most weights have."""

    def add_sums(self, index: int, matrix: torch.Tensor, ones: torch.Tensor) -> None:
        """Add the sums of a matrix's rows, which are a gradient: what most biases have; ``ones`` as long as a row."""


class Accumulate:
    """Adds to ``.grad`` in place, from memory of its own or in the slot of a weight.

    With ``fuses``, what is a product is added by the product itself, as Megatron-LM's gradient accumulation fusion
    does (https://github.com/NVIDIA/Megatron-LM): no pass over the weights, and a sum that rounds otherwise.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], slots: Sequence[torch.Tensor | None], fuses: bool = False
    ) -> None:
        self._weights, self._slots, self._fuses = weights, slots, fuses
        self._gradients = [weight.grad for weight in weights]

    def add(self, index: int, gradient: torch.Tensor) -> None:
        """Add a gradient."""
        known = self._gradients[index]
        if known is None:
            self._set(index, self._place(index).copy_(gradient))
        else:
            known.add_(gradient)

    def add_product(self, index: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Compute the product where it belongs."""
        known = self._gradients[index]
        if known is None:
            self._set(index, torch.mm(left, right, out=self._place(index)))
        elif self._fuses and known.dtype == left.dtype:
            known.addmm_(left, right)
        else:
            known.add_(torch.mm(left, right))

    def add_sums(self, index: int, matrix: torch.Tensor, ones: torch.Tensor) -> None:
        """Compute the sums where they belong."""
        known = self._gradients[index]
        if known is None:
            self._set(index, torch.mv(matrix, ones, out=self._place(index)))
        elif known.dtype == matrix.dtype:
            known.addmv_(matrix, ones)
        else:
            known.add_(sums_of_rows(matrix, ones))

    def _set(self, index: int, gradient: torch.Tensor) -> None:
        self._weights[index].grad = self._gradients[index] = gradient

    def _place(self, index: int) -> torch.Tensor:
        slot = self._slots[index]
        return torch.empty_like(self._weights[index]) if slot is None else slot


class ThroughAutograd:
    """Hands all gradients over at once as autograd does, so that every hook on the weights is called.

    ``arm`` is called right before, with the roots of the graph by which they arrive.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._weights = weights
        self._found: dict[int, torch.Tensor] = {}

    def add(self, index: int, gradient: torch.Tensor) -> None:
        """Keep a gradient."""
        self._found[index] = gradient

    def add_product(self, index: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Keep the product."""
        self._found[index] = torch.mm(left, right)

    def add_sums(self, index: int, matrix: torch.Tensor, ones: torch.Tensor) -> None:
        """Keep the sums."""
        self._found[index] = sums_of_rows(matrix, ones)

    def hand_over(self, arm: Arm | None) -> None:
        """Let autograd add what was kept."""
        weights = [self._weights[index] for index in self._found]
        if arm is not None:
            with torch.enable_grad():
                weights = [weight.view_as(weight) for weight in weights]  # a weight has no graph to be found by
            arm(weights)
        if weights:
            torch.autograd.backward(weights, list(self._found.values()))


class Nowhere:
    """Drops all gradients."""

    def add(self, index: int, gradient: torch.Tensor) -> None:
        """Drop a gradient."""

    def add_product(self, index: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Compute nothing."""

    def add_sums(self, index: int, matrix: torch.Tensor, ones: torch.Tensor) -> None:
        """Compute nothing."""


class Only:
    """Passes on the gradients of some weights."""

    def __init__(self, sink: Sink, wanted: frozenset[int]) -> None:
        self._sink, self._wanted = sink, wanted

    def add(self, index: int, gradient: torch.Tensor) -> None:
        """Pass a gradient on if it is wanted."""
        if index in self._wanted:
            self._sink.add(index, gradient)

    def add_product(self, index: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Pass a product on if it is wanted."""
        if index in self._wanted:
            self._sink.add_product(index, left, right)

    def add_sums(self, index: int, matrix: torch.Tensor, ones: torch.Tensor) -> None:
        """Pass sums on if they are wanted."""
        if index in self._wanted:
            self._sink.add_sums(index, matrix, ones)


def sums_of_rows(matrix: torch.Tensor, ones: torch.Tensor) -> torch.Tensor:
    """Return the sums of a matrix's rows, each added in order, as a matrix product adds; ``ones`` as long as a row."""
    return torch.mv(matrix, ones)


def has_hooks(weights: Sequence[torch.Tensor]) -> bool:
    """Say whether somebody wants to be called when one of the weights gets a gradient."""
    return any(w._backward_hooks or getattr(w, "_post_accumulate_grad_hooks", None) for w in weights)


def finish(sink: Sink, arm: Arm | None) -> None:
    """Complete what a sink does at the end of a backward."""
    if isinstance(sink, ThroughAutograd):
        sink.hand_over(arm)
