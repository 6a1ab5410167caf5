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


class Accumulate:
    """Adds to ``.grad`` in place, from memory of its own or in the slot of a weight."""

    def __init__(self, weights: Sequence[torch.Tensor], slots: Sequence[torch.Tensor | None]) -> None:
        self._weights, self._slots = weights, slots

    def add(self, index: int, gradient: torch.Tensor) -> None:
        """Add a gradient."""
        weight = self._weights[index]
        if weight.grad is not None:
            weight.grad.add_(gradient)
        else:
            weight.grad = self._place(index).copy_(gradient)

    def add_product(self, index: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Compute the product where it belongs."""
        weight = self._weights[index]
        if weight.grad is None:
            weight.grad = torch.mm(left, right, out=self._place(index))
        elif weight.grad.dtype == left.dtype:
            weight.grad.addmm_(left, right)
        else:
            weight.grad.add_(torch.mm(left, right))

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


def has_hooks(weights: Sequence[torch.Tensor]) -> bool:
    """Say whether somebody wants to be called when one of the weights gets a gradient."""
    return any(w._backward_hooks or getattr(w, "_post_accumulate_grad_hooks", None) for w in weights)


def finish(sink: Sink, arm: Arm | None) -> None:
    """Complete what a sink does at the end of a backward."""
    if isinstance(sink, ThroughAutograd):
        sink.hand_over(arm)
