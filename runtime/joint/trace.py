"""The joint graph of a function: its forward and its gradients as one torch.fx graph of ATen ops.

``make_fx`` runs the function and autograd's backward of it once under fake tensors, and records what reaches the
dispatcher below autograd. AOTAutograd's own entry points to the same thing functionalize the graph first, for
compilers; here it runs as recorded, so ops in place stay in place and BatchNorm writes its buffers as in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

from ..parts import Untraceable
from ..seeding import Seed

# An op that does nothing, to mark places in a recording: where random numbers are seeded, and the forward's end.
_LIBRARY = torch.library.Library("stagecut", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("mark(int number) -> ()")  # type: ignore[no-untyped-call]
_LIBRARY.impl("mark", lambda number: None, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_END_OF_FORWARD = -1
_SEED, _OP = "seed", "op"  # kinds of marks


@dataclass(frozen=True)
class Joint:
    """A recorded function of ``n_inputs`` tensors.

    Attributes:
        module: takes the inputs, then a tangent per result that has a gradient; returns ``n_results`` results and then
            the gradients of the inputs that want one (None for those that no result depends on).
        n_forward: how many of its nodes, from the first on, are inputs, tangents and the forward.
        n_inputs, n_results: counts of tensors.
        wanted: the inputs that want gradients.
        differentiable: the results that have gradients.
    """

    module: fx.GraphModule
    n_forward: int
    n_inputs: int
    n_results: int
    wanted: tuple[int, ...]
    differentiable: tuple[int, ...]


def trace(
    function: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    seed: Seed,
    autocast: tuple[str, torch.dtype] | None = None,
) -> Joint:
    """Record ``function(place, *inputs)``, a sequence of tensors, and the gradients of the inputs that require them.

    Args:
        function: may call ``place(name)`` to say where its following ops come from: they have it as ``meta["op"]``.
        seed: what ``function`` seeds its random numbers by; the graph does the same in the same places.
        autocast: device type and dtype of the autocast region that the function runs in; its backward does not.

    Raises:
        Untraceable: it looks at the values of tensors, or does what fake tensors cannot.
    """
    wanted = tuple(index for index, tensor in enumerate(inputs) if tensor.requires_grad)
    marks: list[tuple[str, str]] = []

    def mark(kind: str, name: str) -> None:
        marks.append((kind, name))
        torch.ops.stagecut.mark(len(marks) - 1)

    def forward(*given: torch.Tensor) -> Sequence[torch.Tensor]:
        with torch.enable_grad():
            if autocast is None:
                return function(partial(mark, _OP), *given)
            with torch.autocast(autocast[0], dtype=autocast[1]):
                return function(partial(mark, _OP), *given)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    seed.recording = partial(mark, _SEED)
    try:
        with mode:
            shapes = [result.detach() if result.requires_grad else None for result in forward(*_faked(mode, inputs))]
        fakes = _faked(mode, inputs)
        differentiable = tuple(index for index, tangent in enumerate(shapes) if tangent is not None)
        tangents = [tangent for tangent in shapes if tangent is not None]

        def joint(*given: torch.Tensor) -> list[torch.Tensor | None]:
            own, incoming = given[: len(inputs)], given[len(inputs) :]
            results = list(forward(*own))
            torch.ops.stagecut.mark(_END_OF_FORWARD)
            gradients: Sequence[torch.Tensor | None] = ()
            if wanted and differentiable:
                gradients = torch.autograd.grad(
                    [results[index] for index in differentiable],
                    [own[index] for index in wanted],
                    incoming,
                    allow_unused=True,
                )
            return [*results, *(gradients or [None] * len(wanted))]

        with mode, _use_lazy_graph_module(True):  # nobody calls the whole graph: it need not be compiled
            module = make_fx(joint, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes, *tangents)
    except Exception as error:
        raise Untraceable(f"{type(error).__name__}: {error}") from error
    finally:
        seed.recording = None
    n_forward = _resolve_marks(module, marks, seed)
    return Joint(module, n_forward, len(inputs), len(shapes), wanted, differentiable)


def _faked(mode: FakeTensorMode, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors without memory like ``inputs``: the same shapes, strides and needs of gradients."""
    fakes: list[torch.Tensor] = []
    for tensor in inputs:
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        fakes.append(fake.requires_grad_(tensor.requires_grad))
    return fakes


class _SeedFor(torch.nn.Module):
    def __init__(self, seed: Seed, name: str) -> None:
        super().__init__()
        self._seed, self._name = seed, name

    def forward(self) -> None:
        self._seed.apply(self._name)


def _resolve_marks(module: fx.GraphModule, marks: Sequence[tuple[str, str]], seed: Seed) -> int:
    """Let marked places seed random numbers, note where ops come from, and count the nodes of the forward."""
    op = last = None
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.stagecut.mark.default:
            node.meta["op"] = op
            continue
        number = node.args[0]
        kind, name = marks[number] if number != _END_OF_FORWARD else (None, None)
        if kind == _SEED:
            path = f"_seed_{number}"
            setattr(module, path, _SeedFor(seed, str(name)))
            with module.graph.inserting_before(node):
                module.graph.call_module(path)
        else:
            op = name
        if number == _END_OF_FORWARD:
            last = node.prev
        module.graph.erase_node(node)
    return list(module.graph.nodes).index(last) + 1
