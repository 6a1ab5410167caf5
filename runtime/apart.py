"""Running the parts of a recorded stage: one microbatch's forward, and its backward at once or in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..entries import below_autograd
from ..structure import flatten, unflatten
from .parts import Part, Parts, without_autocast
from .recorded import Recorded
from .sinks import Only, Sink


@dataclass
class Apart:
    """What one microbatch keeps between the parts of its backward.

    ``saved`` is what the next part needs; ``results`` are the forward's differentiable results, as leaves.
    """

    parts: Parts
    weights: list[torch.Tensor]
    activations: list[torch.Tensor]
    results: list[torch.Tensor]
    saved: list[Any]
    given: frozenset[int] = frozenset()


def run_forward(recorded: Recorded, weights: list[torch.Tensor], values: Sequence[Any]) -> tuple[dict[str, Any], Apart]:
    """Compute the stage's results, whose differentiable tensors are leaves of autograd graphs to come."""
    activations = [leaf for leaf in flatten(list(values))[0] if isinstance(leaf, torch.Tensor)]
    parts = recorded.parts
    with below_autograd(), without_autocast(recorded.autocast):
        found = parts.forward([*weights, *activations])
    results, saved = found[: parts.n_results], found[parts.n_results :]
    del found
    for index in recorded.differentiable:
        results[index] = results[index].detach().requires_grad_()
    tensors = iter(results)
    leaves = [next(tensors) if is_tensor else leaf for leaf, is_tensor in zip(recorded.leaves, recorded.is_tensor)]
    apart = Apart(parts, weights, activations, [results[index] for index in recorded.differentiable], saved)
    return unflatten(recorded.structure, leaves), apart


def backward_input(apart: Apart, roots: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    """Give the stage's incoming values their gradients, and keep what the weights' gradients need."""
    found = _run(apart, apart.parts.backward_input, _tangents(apart, roots, gradients))
    _give_inputs(apart, found)
    apart.saved = found[len(apart.parts.input_gradients) :]


def backward_weight(apart: Apart, sink: Sink) -> None:
    """Give the sink the weights' gradients, of what :func:`backward_input` left."""
    _run(apart, apart.parts.backward_weight, [], sink)


def backward(apart: Apart, roots: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], sink: Sink) -> None:
    """Do what both parts do, at once."""
    _give_inputs(apart, _run(apart, apart.parts.backward, _tangents(apart, roots, gradients), sink))


def _run(apart: Apart, part: Part, tangents: list[torch.Tensor], sink: Sink | None = None) -> list[Any]:
    """Call a part with what was saved for it, which nobody else holds any more; nothing if no gradient came."""
    given = [*apart.saved, *tangents]
    apart.saved.clear()
    tangents.clear()
    if not apart.given:
        return []
    with below_autograd():
        return part(given) if sink is None else part(given, _sink_for(apart, sink))


def _sink_for(apart: Apart, sink: Sink) -> Sink:
    """Keep from the sink what no gradient led to: such a weight has none, not one of zeros."""
    if len(apart.given) == len(apart.results):
        return sink
    return Only(sink, frozenset(i for i in apart.parts.weight_gradients if apart.parts.depends[i] & apart.given))


def _give_inputs(apart: Apart, found: Sequence[Any]) -> None:
    for index, gradient in zip(apart.parts.input_gradients, found):
        if apart.parts.depends[index] & apart.given:
            _add_to(apart.activations[index - len(apart.weights)], gradient)


def _tangents(
    apart: Apart, roots: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """Return a gradient for every differentiable result, zeros where none came."""
    own = {id(result) for result in apart.results}
    others = [(root, gradient) for root, gradient in zip(roots, gradients) if id(root) not in own]
    if others:  # the loss, and values of the stage's own inputs
        torch.autograd.backward([root for root, _ in others], [gradient for _, gradient in others])
    for root, gradient in zip(roots, gradients):
        if id(root) in own and gradient is not None:
            _add_to(root, gradient)
    apart.given = frozenset(index for index, result in enumerate(apart.results) if result.grad is not None)
    tangents = [_like(result, result.grad) for result in apart.results]
    for result in apart.results:
        result.grad = None
    return tangents


def _like(result: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Return the gradient in the layout of its result, which it was recorded with."""
    if gradient is None:
        return torch.zeros_like(result)
    if gradient.stride() == result.stride():
        return gradient
    return torch.empty_like(result).copy_(gradient)


def _add_to(leaf: torch.Tensor, gradient: torch.Tensor) -> None:
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
