"""A stage's backward in two parts: explicit graphs where its ops can be recorded, autograd as a whole where not.

Input gradients that run apart from weight gradients let the stage before go on sooner (Qi et al., ICLR 2024,
https://arxiv.org/abs/2401.10241). Running autograd twice, or cutting its graph, costs 1.04 to 2.7 times one backward;
graphs that were cut beforehand (joint/) do the work of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..structure import Structure, flatten, unflatten
from .joint import Part, Parts, Untraceable, cut, trace
from .program.recordable import why_not_call, why_not_module, why_not_node
from .seeding import MethodCall, Seed, Seeded
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


@dataclass(frozen=True)
class _Recorded:
    """The parts for one signature, and how their results become the stage's."""

    parts: Parts
    structure: Structure
    leaves: tuple[Any, ...]  # of the results; None where a tensor belongs
    is_tensor: tuple[bool, ...]
    differentiable: tuple[int, ...]
    autocast: tuple[str, torch.dtype] | None


@dataclass
class Recorder:
    """Records a stage's module once per signature of its arguments."""

    seed: Seed
    known: dict[Any, _Recorded | Untraceable] = field(default_factory=dict)

    def parts_for(self, module: fx.GraphModule, values: Sequence[Any], state: Any) -> _Recorded:
        """Return the parts of ``module`` for arguments like ``values`` and the autocast region that is open.

        ``state`` stands for its modes and parameters.

        Raises:
            Untraceable: the module cannot be recorded; asked again, the same.
        """
        leaves, structure = flatten(list(values))
        autocast = _autocast_of(leaves)
        key = (id(module), state, autocast, repr(structure), tuple(map(_signature, leaves)))
        found = self.known.get(key)
        if found is None:
            try:
                found = self._record(module, leaves, structure, autocast)
            except Untraceable as error:
                found = error
            self.known[key] = found
        if isinstance(found, Untraceable):
            raise found
        return found

    def _record(
        self,
        module: fx.GraphModule,
        leaves: Sequence[Any],
        structure: Structure,
        autocast: tuple[str, torch.dtype] | None,
    ) -> _Recorded:
        why = why_not_stage(module)
        if why is not None:
            raise Untraceable(why)
        _refuse_shared_memory(leaves)
        state = state_of(module)
        made: dict[str, Any] = {}

        def function(*tensors: torch.Tensor) -> list[torch.Tensor]:
            given = iter(tensors[len(state) :])
            values = unflatten(structure, [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
            named = dict(zip(state, tensors))
            results, made["structure"] = flatten(torch.func.functional_call(module, named, tuple(values)))
            made["leaves"] = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in results)
            made["is_tensor"] = tuple(isinstance(leaf, torch.Tensor) for leaf in results)
            return [leaf for leaf in results if isinstance(leaf, torch.Tensor)]

        tensors = [*state.values(), *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))]
        joint = trace(function, tensors, self.seed, autocast)
        parts = cut(joint, len(state))
        return _Recorded(parts, made["structure"], made["leaves"], made["is_tensor"], joint.differentiable, autocast)


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's parameters and buffers, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def run_forward(
    recorded: _Recorded, weights: list[torch.Tensor], values: Sequence[Any]
) -> tuple[dict[str, Any], Apart]:
    """Compute the stage's results, whose differentiable tensors are leaves of autograd graphs to come."""
    activations = [leaf for leaf in flatten(list(values))[0] if isinstance(leaf, torch.Tensor)]
    parts = recorded.parts
    with torch.no_grad(), _without_autocast(recorded.autocast):
        found = parts.forward([*weights, *activations])
    results, saved = found[: parts.n_results], found[parts.n_results :]
    del found
    for index in recorded.differentiable:
        results[index] = results[index].detach().requires_grad_()
    tensors = iter(results)
    leaves = [next(tensors) if is_tensor else leaf for leaf, is_tensor in zip(recorded.leaves, recorded.is_tensor)]
    apart = Apart(parts, weights, activations, [results[index] for index in recorded.differentiable], saved)
    return unflatten(recorded.structure, leaves), apart


@contextlib.contextmanager
def _without_autocast(autocast: tuple[str, torch.dtype] | None) -> Iterator[None]:
    """Leave the autocast region: its casts were recorded."""
    if autocast is None:
        yield
    else:
        with torch.autocast(autocast[0], enabled=False):
            yield


def run_backward_input(apart: Apart, roots: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    """Give the stage's incoming values their gradients, and keep what the weights' gradients need."""
    found = _run(apart, apart.parts.backward_input, _tangents(apart, roots, gradients))
    _give_inputs(apart, found)
    apart.saved = found[len(apart.parts.input_gradients) :]


def run_backward_weight(apart: Apart, sink: Sink) -> None:
    """Give the sink what this microbatch adds to the weights."""
    _run(apart, apart.parts.backward_weight, [], sink)


def run_backward(
    apart: Apart, roots: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], sink: Sink
) -> None:
    """Do what both parts do, at once."""
    _give_inputs(apart, _run(apart, apart.parts.backward, _tangents(apart, roots, gradients), sink))


def _run(apart: Apart, part: Part, tangents: list[torch.Tensor], sink: Sink | None = None) -> list[Any]:
    """Call a part with what was saved for it, which nobody else holds any more; nothing if no gradient came."""
    given = [*apart.saved, *tangents]
    apart.saved.clear()
    tangents.clear()
    if not apart.given:
        return []
    with torch.no_grad():
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
    tangents = [torch.zeros_like(result) if result.grad is None else result.grad for result in apart.results]
    for result in apart.results:
        result.grad = None
    return tangents


def _add_to(leaf: torch.Tensor, gradient: torch.Tensor) -> None:
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def why_not_stage(module: fx.GraphModule) -> str | None:
    """Say what in a stage no recording can stand for; None if all can be recorded."""
    for node in module.graph.nodes:
        seeded = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(seeded, Seeded):
            why = why_not_node(node, module)
        elif isinstance(seeded.function, nn.Module):
            why = why_not_module(seeded.function)
        else:
            why = None if isinstance(seeded.function, MethodCall) else why_not_call(seeded.function)
        if why is not None:
            return why
    return None


def _autocast_of(leaves: Sequence[Any]) -> tuple[str, torch.dtype] | None:
    """Return device type and dtype of the autocast region that is open on the device of the first tensor."""
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)), "cpu")
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)
    return (type(leaf), repr(leaf))


def _refuse_shared_memory(leaves: Sequence[Any]) -> None:
    """Refuse arguments that may be two views of one memory: a change in place of one would be one of the other."""
    places = [leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel()]
    if len(set(places)) < len(places):
        raise Untraceable("two of its inputs share memory")
