"""A stage's backward in two parts: explicit graphs where its ops can be recorded, autograd as a whole where not.

Input gradients that run apart from weight gradients let the stage before go on sooner (Qi et al., ICLR 2024,
https://arxiv.org/abs/2401.10241). Running autograd twice, or cutting its graph, costs 1.04 to 2.7 times one backward;
graphs that were cut beforehand (joint/) do the work of one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..structure import Structure, flatten, unflatten
from .parts import Part, Parts, Untraceable
from .program.recordable import has_module_hooks, why_not_call, why_not_module, why_not_node
from .seeding import MethodCall, Seed, Seeded
from .sinks import Accumulate, Arm, Nowhere, Only, Sink, ThroughAutograd, finish, has_hooks

_STEPS_BEFORE = 2  # that a signature comes up in, before it is recorded for steps that do not split backwards
_MOST_RECORDED = 16
_MOST_SEEN = 1024
_MOST_OPS = 200  # of a stage that is recorded though its backward is not split: each takes up to 20 ms


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


class Explicit:
    """The explicit parts of one stage, recorded once per signature of its arguments.

    A step that computes input and weight gradients apart records what it meets at once. One that does not records what
    has come up in a few steps: explicit graphs do the same work as autograd, with less to do per op, and put weight
    gradients where they belong without a copy; but recording takes as long as some steps.

    Attributes:
        slots: by id of a parameter, where its gradient belongs.
        why_not: why the latest forward was not recorded, if it was to be.
    """

    def __init__(self, seed: Seed) -> None:
        self.seed = seed
        self.slots: dict[int, torch.Tensor] = {}
        self.why_not: str | None = None
        self._known: dict[Any, _Recorded | str] = {}  # or why there is none
        self._seen: dict[Any, list[int]] = {}
        self._n_steps = self._n_ops = 0
        self._wanted = False
        self._at_once = False
        self._has_hooks = False
        self._weights: list[torch.Tensor] = []
        self._places: list[torch.Tensor | None] = []
        self._settings: tuple[Any, ...] = ()
        self._state: Any = None

    def look_at(self, module: fx.GraphModule) -> None:
        """Note what of the stage's modules may have changed."""
        self._weights = list(state_of(module).values())
        self._places = [self.slots.get(id(weight)) for weight in self._weights]
        layouts = ((tuple(w.shape), w.stride(), w.dtype) for w in self._weights)
        self._settings = (*map(_settings_of, module.modules()), *layouts)
        self._n_ops = len(module.graph.nodes)

    def begin(self, splits: bool, steady: bool) -> None:
        """Prepare for a step: one that ``splits`` backwards, or one like many others to come (``steady``)."""
        self._n_steps += 1
        self._at_once, self._wanted, self.why_not = splits, splits or steady, None
        if self._wanted:
            self._has_hooks = not self.slots and has_hooks(self._weights)
            self._state = (self._settings, tuple(weight.requires_grad for weight in self._weights))

    def forward(self, module: fx.GraphModule, values: Sequence[Any]) -> tuple[dict[str, Any], Apart] | None:
        """Compute the results of ``module``, and what its backward needs; None where autograd is to do it."""
        if not self._wanted or not torch.is_grad_enabled():
            return None
        try:
            recorded = self._parts_for(module, values)
        except Untraceable as reason:
            self.why_not = str(reason) if self._at_once else None
            return None
        return None if recorded is None else run_forward(recorded, self._weights, values)

    def backward(
        self, apart: Apart, roots: list[torch.Tensor], gradients: list[torch.Tensor | None], arm: Arm | None
    ) -> None:
        """Do what both parts do, at once."""
        sink = self._sink(arm)
        _give_inputs(apart, _run(apart, apart.parts.backward, _tangents(apart, roots, gradients), sink))
        finish(sink, arm)

    def backward_weight(self, apart: Apart, arm: Arm | None) -> None:
        """Give the weights what :func:`run_backward_input` left."""
        sink = self._sink(arm)
        _run(apart, apart.parts.backward_weight, [], sink)
        finish(sink, arm)

    def _sink(self, arm: Arm | None) -> Sink:
        if arm is not None or self._has_hooks:
            return ThroughAutograd(self._weights)
        return Accumulate(self._weights, self._places)

    def _parts_for(self, module: fx.GraphModule, values: Sequence[Any]) -> _Recorded | None:
        """Return the parts of ``module`` for arguments like ``values`` and the autocast region that is open.

        Raises:
            Untraceable: the module cannot be recorded; asked again, the same.
        """
        leaves, structure = flatten(list(values))
        autocast = _autocast_of(leaves)
        key = (id(module), self._state, autocast, repr(structure), tuple(map(_signature, leaves)))
        found = self._known.get(key)
        if found is None:
            if not self._at_once and not self._is_worth_it(key):
                return None
            try:
                found = self._record(module, leaves, structure, autocast)
            except Untraceable as error:
                found = str(error)
            while len(self._known) >= _MOST_RECORDED:
                del self._known[next(iter(self._known))]
            self._known[key] = found
        if isinstance(found, str):
            raise Untraceable(found)
        return found

    def _is_worth_it(self, key: Any) -> bool:
        """Say whether a signature has come up in some steps, and is not one of many."""
        if (
            self._n_ops > _MOST_OPS
            or len(self._known) >= _MOST_RECORDED
            or (key not in self._seen and len(self._seen) >= _MOST_SEEN)
        ):
            return False
        count = self._seen.setdefault(key, [0, 0])
        if count[1] != self._n_steps:
            count[:] = [count[0] + 1, self._n_steps]
        return count[0] > _STEPS_BEFORE

    def _record(
        self,
        module: fx.GraphModule,
        leaves: Sequence[Any],
        structure: Structure,
        autocast: tuple[str, torch.dtype] | None,
    ) -> _Recorded:
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
        joint = trace(function, tensors, self.seed, autocast)
        parts = cut(joint, len(state))
        with _without_autocast(autocast):
            _rehearse(parts, tensors, len(state), joint.differentiable)
        return _Recorded(parts, made["structure"], made["leaves"], made["is_tensor"], joint.differentiable, autocast)


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


def _settings_of(module: nn.Module) -> tuple[Any, ...]:
    """Return what a recording takes for granted of a module: its mode, its plain attributes, whether it has hooks."""
    plain = (repr(value) if isinstance(value, tuple) else value for value in vars(module).values())
    own = tuple(value for value in plain if value is None or isinstance(value, (bool, int, float, str)))
    return (*own, has_module_hooks(module))


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
