"""Recording a stage: its joint graph cut into parts, rehearsed before it is used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..structure import Structure, flatten, unflatten
from .parts import Parts, Untraceable, without_autocast
from .program.recordable import why_not_call, why_not_module, why_not_node
from .seeding import MethodCall, Seed, Seeded
from .sinks import Nowhere


@dataclass(frozen=True)
class Recorded:
    """The parts for one signature, and how their results become the stage's."""

    parts: Parts
    structure: Structure
    leaves: tuple[Any, ...]  # of the results; None where a tensor belongs
    is_tensor: tuple[bool, ...]
    differentiable: tuple[int, ...]
    autocast: tuple[str, torch.dtype] | None


def record(
    module: fx.GraphModule,
    leaves: Sequence[Any],
    structure: Structure,
    autocast: tuple[str, torch.dtype] | None,
    seed: Seed,
    fuses: bool = False,
    onednn: bool = False,
) -> Recorded:
    """Record ``module`` for arguments like ``leaves``, which ``structure`` nests, in an autocast region if given.

    With ``fuses``, the sums that are gradients of biases are left to the sink as products; with ``onednn``, large
    products to oneDNN.

    Raises:
        Untraceable: it cannot be recorded.
    """
    from .joint import cut, trace  # what they import takes longer than all else that a worker imports of torch.fx

    why = why_not_stage(module)
    if why is not None:
        raise Untraceable(why)
    _refuse_shared_memory(leaves)
    state = state_of(module)
    made: dict[str, Any] = {}

    def function(place: Callable[[str], None], *tensors: torch.Tensor) -> list[torch.Tensor]:
        given = iter(tensors[len(state) :])
        values = unflatten(structure, [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
        named = {f"module.{name}": tensor for name, tensor in zip(state, tensors)}
        called = torch.func.functional_call(_Placed(module, place), named, tuple(values))
        results, made["structure"] = flatten(called)
        made["leaves"] = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in results)
        made["is_tensor"] = tuple(isinstance(leaf, torch.Tensor) for leaf in results)
        return [leaf for leaf in results if isinstance(leaf, torch.Tensor)]

    tensors = [*state.values(), *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))]
    joint = trace(function, tensors, seed, autocast)
    parts = cut(joint, len(state), fuses, onednn)
    with without_autocast(autocast):
        _rehearse(parts, tensors, len(state), joint.differentiable)
    return Recorded(parts, made["structure"], made["leaves"], made["is_tensor"], joint.differentiable, autocast)


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's parameters and buffers, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _rehearse(parts: Parts, tensors: Sequence[torch.Tensor], n_weights: int, differentiable: Sequence[int]) -> None:
    """Run all parts once on copies of what they may change, with gradients of zeros, and keep nothing.

    Fake tensors' strides are not always those of real ones; then a view that was recorded fails.

    Raises:
        Untraceable: a part fails.
    """
    given = [
        tensor.detach() if index < n_weights and isinstance(tensor, nn.Parameter) else tensor.detach().clone()
        for index, tensor in enumerate(tensors)
    ]
    try:
        with torch.no_grad():
            parts.backward(_forwarded(parts, given, differentiable), Nowhere())
            found = parts.backward_input(_forwarded(parts, given, differentiable))
            del found[: len(parts.input_gradients)]
            parts.backward_weight(found, Nowhere())
    except Exception as error:
        raise Untraceable(f"what was recorded does not run: {type(error).__name__}: {error}") from error


def _forwarded(parts: Parts, given: Sequence[torch.Tensor], differentiable: Sequence[int]) -> list[Any]:
    """Run the forward and return what a backward takes; nobody else holds any of it, so that it goes as it is used."""
    found = parts.forward(list(given))
    tangents = [torch.zeros_like(found[index]) for index in differentiable]
    return [*found[parts.n_results :], *tangents]


class _Placed(nn.Module):
    """A stage's module that tells ``place`` the name of every op before it runs."""

    def __init__(self, module: fx.GraphModule, place: Callable[[str], None]) -> None:
        super().__init__()
        self.module, self._place = module, place

    def forward(self, *values: Any) -> Any:
        place = self._place

        class Placing(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                place(n.name)
                return super().run_node(n)

        return Placing(self.module).run(*values)


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


def _refuse_shared_memory(leaves: Sequence[Any]) -> None:
    """Refuse arguments that overlap in memory: a change in place of one would be one of the other.

    The values of one packet lie beside each other in one storage, which is no overlap.
    """
    extents = sorted(map(_extent, (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel())))
    if any(end > start for (_, end), (start, _) in itertools.pairwise(extents)):
        raise Untraceable("two of its inputs overlap in memory")


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where a tensor's first element begins and its last one ends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
