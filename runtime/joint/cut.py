"""Cutting a joint graph: forward, input gradients, weight gradients, and the backward as a whole.

What was recorded before the forward's end is the forward. Of the backward's nodes, input gradients take all that they
depend on, and weight gradients the rest. Values pass from part to part by explicit lists, so that each part can free
what it was given as soon as it has used it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
from torch import fx

from ..parts import Part, Parts, Untraceable
from .effects import Effects
from .fusing import sum_by_products
from .products import multiply_by_onednn
from .simplify import simplify
from .source import function_of
from .trace import Joint

_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


def cut(joint: Joint, n_weights: int, fuses: bool = False, onednn: bool = False) -> Parts:
    """Cut ``joint``, whose first ``n_weights`` inputs are weights and buffers, and whose others are activations.

    With ``fuses``, gradients of biases are products, which a sink can add where they belong; they round otherwise. With
    ``onednn`` large products are left to oneDNN, which rounds otherwise too.

    Raises:
        Untraceable: the backward changes a value in place that both kinds of gradients use.
    """
    copied = deepcopy(joint.module.graph)
    whole = _Graph(joint, joint.module.graph, n_weights, fuses, onednn)
    apart = _Graph(joint, copied, n_weights, fuses, onednn, splits_convolutions=True)
    for_inputs = apart.backward_nodes(apart.of_inputs.values(), ())
    for_weights = apart.backward_nodes(apart.of_weights.values(), for_inputs)
    changer = apart.effects.read_before_changed(for_weights, for_inputs)
    if changer is not None:
        raise Untraceable(f"its backward changes a value in place that both of its parts use: {changer.format_node()}")
    saved = _names(
        [
            *whole.read_by(whole.backward_nodes([*whole.of_inputs.values(), *whole.of_weights.values()], ())),
            *apart.read_by([*for_inputs, *for_weights]),
        ],
        within=apart.forward_names,
    )
    passed = _names(
        [*apart.read_by(for_weights), *filter(None, apart.of_weights.values())],
        within={*saved, *(node.name for node in for_inputs), *(node.name for node in apart.tangents)},
    )
    tangents = [node.name for node in whole.tangents]
    inputs = [node.name for node in whole.inputs]
    both = whole.backward_nodes([*whole.of_inputs.values(), *whole.of_weights.values()], ())
    return Parts(
        forward=whole.part(inputs, whole.forward_nodes(saved), [*map(_name, whole.results), *saved]),
        backward_input=apart.part([*saved, *tangents], for_inputs, [*map(_name, apart.of_inputs.values()), *passed]),
        backward_weight=apart.part(passed, for_weights, [], sinks=True),
        backward=whole.part([*saved, *tangents], both, [_name(node) for node in whole.of_inputs.values()], sinks=True),
        n_results=joint.n_results,
        input_gradients=tuple(whole.of_inputs),
        weight_gradients=tuple(whole.of_weights),
        depends=whole.depends(),
    )


class _Graph:
    """The joint graph or a copy of it, simplified: its nodes have the names that they have in every copy."""

    def __init__(
        self,
        joint: Joint,
        graph: fx.Graph,
        n_weights: int,
        fuses: bool,
        onednn: bool,
        splits_convolutions: bool = False,
    ) -> None:
        self.module, self.graph = joint.module, graph
        nodes = list(self.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        self.inputs, self.tangents = placeholders[: joint.n_inputs], placeholders[joint.n_inputs :]
        for index, node in enumerate(nodes):
            node.meta["forward"] = index < joint.n_forward and node not in self.tangents
        simplify(self.graph)
        if fuses:
            sum_by_products(self.graph, self.module)
        if onednn:
            multiply_by_onednn(self.graph)
        if splits_convolutions:
            _split_convolutions(self.graph)
        self.forward_names = {node.name for node in self.graph.nodes if node.meta["forward"]}
        self.effects = Effects(self.graph)
        returned = list(nodes[-1].args[0])
        self.results: list[fx.Node | None] = returned[: joint.n_results]
        of = dict(zip(joint.wanted, returned[joint.n_results :]))
        self.of_inputs: dict[int, fx.Node | None] = {i: node for i, node in of.items() if i >= n_weights}
        self.of_weights: dict[int, fx.Node | None] = {i: node for i, node in of.items() if i < n_weights}

    def forward_nodes(self, saved: Sequence[str]) -> list[fx.Node]:
        """List what the results, the saved values and all effects need of the forward."""
        own = [node for node in self._computed() if node.name in self.forward_names]
        kept = set(saved)
        roots = [node for node in own if node.name in kept or node.op == "call_module" or node.is_impure()]
        needed = self.effects.ancestors([*roots, *filter(None, self.results)])
        return [node for node in own if node in needed]

    def backward_nodes(self, outputs: Iterable[fx.Node | None], done: Sequence[fx.Node]) -> list[fx.Node]:
        """List what ``outputs`` need of the backward, without the nodes that are done."""
        needed, known = self.effects.ancestors(filter(None, outputs)), set(done)
        return [n for n in self._computed() if n in needed and n not in known and n.name not in self.forward_names]

    def read_by(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """List what ``nodes`` use, in the order of the graph."""
        used = {argument for node in nodes for argument in node.all_input_nodes}
        return [node for node in self.graph.nodes if node in used]

    def depends(self) -> dict[int, frozenset[int]]:
        """Return the tangents that each gradient depends on."""
        of: dict[fx.Node, frozenset[int]] = {node: frozenset([i]) for i, node in enumerate(self.tangents)}
        for node in self.graph.nodes:
            of.setdefault(node, frozenset().union(*(of[before] for before in self.effects.needed_by(node))))
        gradients = {**self.of_inputs, **self.of_weights}
        return {i: frozenset() if node is None else of[node] for i, node in gradients.items()}

    def part(
        self, takes: Sequence[str], nodes: Sequence[fx.Node], gives: Sequence[str | None], sinks: bool = False
    ) -> Part:
        """Compile some of the nodes into a function of the values that it takes; with or without a sink for weights."""
        sunk: dict[str, list[int]] = {}
        for index, node in self.of_weights.items() if sinks else ():
            if node is not None:
                sunk.setdefault(node.name, []).append(index)
        read = {argument for node in nodes for argument in node.all_input_nodes}
        constants = [node for node in self.graph.nodes if node.op == "get_attr" and node not in nodes]
        wanted = [node for node in constants if node in read or node.name in gives or node.name in sunk]
        return function_of(takes, [*wanted, *nodes], gives, self.module, sunk if sinks else None)

    def _computed(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op not in ("placeholder", "output")]


def _name(node: fx.Node | None) -> str | None:
    return None if node is None else node.name


def _names(nodes: Iterable[fx.Node], within: set[str]) -> list[str]:
    return list(dict.fromkeys(n.name for n in nodes if n.name in within and n.op != "get_attr"))


def _split_convolutions(graph: fx.Graph) -> None:
    """Compute every convolution's input gradient apart from its weights' gradients, by the mask of its backward."""
    for node in list(graph.nodes):
        if node.target is not _CONVOLUTION_BACKWARD or not node.args[-1][0] or not any(node.args[-1][1:]):
            continue
        _, weight, bias = node.args[-1]
        with graph.inserting_after(node):
            apart = graph.node_copy(node)
            apart.args = (*node.args[:-1], [False, weight, bias])
            apart.meta = dict(node.meta)
        node.args = (*node.args[:-1], [True, False, False])
        for user in list(node.users):
            if user.target is operator.getitem and user.args[1] > 0:
                user.replace_input_with(node, apart)
