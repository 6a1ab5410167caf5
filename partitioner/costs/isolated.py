"""One op of a captured graph by itself, on made-up inputs, so that it can be timed or priced."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx, nn

from ...runtime.program.calls import Folded, InRegion
from ...structure import flatten, map_leaves, tensors_in
from ..analysis import OpFacts
from ..meter import storage_of


class Timed(Protocol):
    """Work that can be run by itself, again and again."""

    writes_inputs: bool

    def inputs(self, make: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, Any]:
        """Build positional and keyword arguments with ``make`` for each tensor."""

    def values_of(self, names: Sequence[str]) -> list[Any]:
        """Return the values by these names."""

    def standalone(self, device: torch.device) -> tuple[Callable[..., Any], list[torch.Tensor]]:
        """Return the work as a function, and its own parameters."""

    def signature(self, context: str) -> str:
        """Name the work."""


class Isolated:
    """One op by itself, on inputs of the right shapes, so that it can be run again and again."""

    def __init__(self, node: fx.Node, module: fx.GraphModule, facts: dict[str, OpFacts]) -> None:
        self.node = node
        self.facts = facts
        self.owner = module
        self.writes_inputs = bool(
            facts[node.name].written
            & {storage_of(t) for i in node.all_input_nodes for t in tensors_in(facts[i.name].value)}
        )

    def inputs(self, make: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, Any]:
        """Build the op's arguments with ``make`` for each tensor."""
        made: dict[str, Any] = {}

        def resolve(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            if leaf.name not in made:
                value = self.facts[leaf.name].value
                made[leaf.name] = map_leaves(lambda item: make(item) if isinstance(item, torch.Tensor) else item, value)
            return made[leaf.name]

        args, kwargs = fx.node.map_aggregate((self.node.args, dict(self.node.kwargs)), resolve)
        return list(args), dict(kwargs)

    def values_of(self, names: Sequence[str]) -> list[Any]:
        """Return the values by these names, as the facts have them."""
        return [self.facts[name].value for name in names]

    def _module(self) -> nn.Module | None:
        """Return the module that the op calls, directly or in a region."""
        if self.node.op == "call_module":
            return self.owner.get_submodule(str(self.node.target))
        if isinstance(self.node.target, InRegion) and self.node.target.function is None:
            first: Any = self.node.args[0]
            called: nn.Module = self.facts[first.name].value
            return called
        return None

    def call(self, args: Any, kwargs: Any, state: dict[str, torch.Tensor] | None) -> Any:
        """Run the op; modules run on copies of their buffers, so that nothing of the model changes."""
        module = self._module()
        if module is not None:
            return self._call_module(
                lambda *given, **named: torch.func.functional_call(module, state or {}, given, named), args, kwargs
            )
        if self.node.op == "call_method":
            return getattr(args[0], str(self.node.target))(*args[1:], **kwargs)
        assert callable(self.node.target)
        return self.node.target(*args, **kwargs)

    def _call_module(self, module: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if isinstance(self.node.target, InRegion):
            return self.node.target(module, *args[1:], **kwargs)
        return module(*args, **kwargs)

    def state(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy the state of the op's module."""
        module = self._module()
        if module is None:
            return {}
        return {name: copy(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}

    def standalone(self, device: torch.device) -> tuple[Callable[..., Any], list[torch.Tensor]]:
        """Return the op as a function, and its parameters: a module's own copy on ``device``; the model is left alone.

        Swapping a module's state at every call instead would cost more than a small op takes.
        """
        module = self._module()
        if module is None:
            return (lambda *args, **kwargs: self.call(args, kwargs, None)), []
        own = copy.deepcopy(module).to(device)
        return (lambda *args, **kwargs: self._call_module(own, args, kwargs)), list(own.parameters())

    def signature(self, context: str) -> str:
        """Name the work: equal signatures cost the same."""
        described: list[str] = []

        def describe(leaf: Any) -> None:
            described.append(_describe(self.facts[leaf.name].value) if isinstance(leaf, fx.Node) else repr(leaf))

        fx.node.map_aggregate((self.node.args, self.node.kwargs), describe)
        target = self.facts[self.node.name].target
        module = self._module()
        if module is not None:
            state = [f"{tuple(t.shape)}{t.dtype}{t.requires_grad}" for t in (*module.parameters(), *module.buffers())]
            code = module.body.code if isinstance(module, Folded) else ""
            region = self.node.target if isinstance(self.node.target, InRegion) else ""
            target = f"{type(module).__module__}.{type(module).__qualname__}{module!r}{state}{code}{region}"
        text = "|".join([context, self.node.op, target, *described])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _describe(value: Any) -> str:
    def one(leaf: Any) -> str:
        if isinstance(leaf, nn.Module):
            return type(leaf).__qualname__
        if isinstance(leaf, torch.Tensor):
            return f"{tuple(leaf.shape)}{leaf.stride()}{leaf.dtype}{leaf.requires_grad}"
        return repr(leaf)

    return ",".join(one(leaf) for leaf in flatten(value)[0])


def cloned(leaf: Any) -> Any:
    """Copy a tensor leaf."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
