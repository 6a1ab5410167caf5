"""One graph for training and evaluation: what ``self.training`` decided in the model's code is decided when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import fx, nn


class ModeSwitch(nn.Module):
    """Give the first value in training mode and the second in evaluation mode: what ``self.training`` decided."""

    def forward(self, in_training: Any, in_evaluation: Any) -> Any:
        """Choose by this module's own mode, which follows that of the module whose code asked."""
        return in_training if self.training else in_evaluation


def owner_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return str(next(reversed(stack.values()))[0])


def merge_modes(trained: fx.Graph, evaluated: fx.Graph) -> str | None:
    """Make ``trained`` serve both modes; returns the module that stands in the way, or None.

    Where the two graphs differ only in plain values (``F.dropout(training=self.training)``), a switch chooses the value
    when the graph runs.
    """
    ours, theirs = list(trained.nodes), list(evaluated.nodes)
    for a, b in zip(ours, theirs):
        if (a.op, a.target, a.name) != (b.op, b.target, b.name) or not _same_shape(a, b):
            return owner_of(a)
    if len(ours) != len(theirs):
        longer = ours if len(ours) > len(theirs) else theirs
        return owner_of(longer[min(len(ours), len(theirs))])
    count = 0
    for a, b in zip(ours, theirs):
        flat_a, _ = _arguments(a)
        flat_b, _ = _arguments(b)
        for index, (x, y) in enumerate(zip(flat_a, flat_b)):
            if isinstance(x, fx.Node) or equal_values(x, y):
                continue
            with trained.inserting_before(a):
                switch = trained.call_module(f"_mode_{count}", (x, y))
            switch.meta["mode_owner"] = owner_of(a)
            flat_a[index] = switch
            count += 1
        leaves = iter(flat_a)
        a.args, a.kwargs = fx.node.map_aggregate((a.args, a.kwargs), partial(_replaced, leaves))
    return None


def _replaced(leaves: Iterator[Any], _: Any) -> Any:
    return next(leaves)


def _arguments(node: fx.Node) -> tuple[list[Any], Any]:
    """Return the leaves of a node's arguments, those inside slices too, and what is left without them."""
    leaves: list[Any] = []
    nesting = fx.node.map_aggregate((node.args, node.kwargs), leaves.append)
    return leaves, nesting


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    flat_a, nesting_a = _arguments(a)
    flat_b, nesting_b = _arguments(b)
    if len(flat_a) != len(flat_b) or nesting_a != nesting_b:
        return False
    return all(
        isinstance(x, fx.Node) == isinstance(y, fx.Node) and (not isinstance(x, fx.Node) or x.name == y.name)
        for x, y in zip(flat_a, flat_b)
    )


def equal_values(x: Any, y: Any) -> bool:
    if isinstance(x, fx.Node):
        return True
    return x is y or (type(x) is type(y) and bool(x == y))
