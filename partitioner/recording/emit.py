"""Calls become a torch.fx graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx

from ...errors import ShapeError
from ...runtime.program.calls import Checkpointed, InRegion, ModeSwitch, Skippable
from .calls import Call, Region, map_values
from .modes import SWITCH
from .numbers import Expr, Ref

SOURCE = "stagecut_source"
ONLY = "stagecut_only"
OWNER = "mode_owner"
_STEPS: dict[str, Callable[[Any, Any], Any]] = {"item": operator.getitem, "field": getattr}
Attributes = dict[str, Any]


class Emitter:
    """Writes calls into one graph; ``attribute`` finds what the graph refers to by path, ``type_of`` a module's class.

    ``module_of`` makes a module of the graph of calls that were folded into one.

    ``attributes`` collects all that the graph refers to, ``owners`` the module whose mode each switch follows.
    """

    def __init__(
        self,
        attribute: Callable[[str], Any],
        type_of: Callable[[str], Any],
        module_of: Callable[[Attributes, fx.Graph], fx.GraphModule],
    ) -> None:
        self.graph = fx.Graph()
        self._module_of = module_of
        self.attributes: Attributes = {}
        self.owners: dict[str, str] = {}
        self._attribute = attribute
        self._type_of = type_of
        self._calls: Sequence[Call] = ()
        self._nodes: list[fx.Node] = []
        self._parts: dict[Ref, fx.Node] = {}
        self._numbers: dict[Expr, fx.Node] = {}
        self._regions: dict[InRegion, InRegion] = {}
        self._looks: list[fx.Node] = []
        self._count = 0

    def emit(self, calls: Sequence[Call]) -> None:
        """Write all calls."""
        self._calls = calls
        for call in calls:
            self._nodes.append(self._call(call))

    def output(self, trained: list[fx.Node], evaluated: list[fx.Node] | None) -> None:
        """Write the results of both modes; what only one mode looks at is looked at in that mode only."""
        self.graph.output((trained, evaluated))
        for node in reversed(self._looks):
            modes = {mode for user in node.users for mode in _modes_of_use(node, user)}
            if ONLY not in node.meta and len(modes) == 1 and None not in modes:
                node.meta[ONLY] = modes.pop()

    def value(self, leaf: Any) -> Any:
        """Return the node that stands for a reference or a computed number; other leaves as they are."""
        if isinstance(leaf, Ref):
            return self._part(leaf)
        return self._number(leaf) if isinstance(leaf, Expr) else leaf

    def _call(self, call: Call) -> fx.Node:
        args = map_values(self.value, tuple(call.args))
        kwargs = map_values(self.value, dict(call.kwargs))
        if call.op == "placeholder":
            return self.graph.placeholder(call.target)
        if call.op == SWITCH:
            name = f"_mode_{len(self.owners)}"
            self.owners[name] = call.target
            node = self._create("call_module", name, args, {}, call)
            self.attributes[name] = ModeSwitch(call.target)
            node.meta[OWNER] = call.target
            return node
        if call.op in ("checkpoint", "skippable"):
            return self._folded(call, args)
        target = call.target
        if call.op in ("get_attr", "call_module"):
            self.attributes[target] = self._attribute(target)
        if call.region != Region() and call.op != "get_attr":
            return self._in_region(call, args, kwargs)
        return self._create(call.op, target, args, kwargs, call)

    def _in_region(self, call: Call, args: Any, kwargs: Any) -> fx.Node:
        function = None if call.op == "call_module" else call.target
        if call.op == "call_module":
            args = (self._create("get_attr", call.target, (), {}, call), *args)
        region = InRegion(call.region.grad, call.region.autocast, function, call.region.cudnn)
        return self._create("call_function", self._regions.setdefault(region, region), args, kwargs, call)

    def _folded(self, call: Call, args: Any) -> fx.Node:
        inner = Emitter(self._attribute, self._type_of, self._module_of)
        inner.emit(call.body)
        inner.graph.output(tuple(inner.value(ref) for ref in call.results))
        name = f"_{call.op}_{self._count}"
        self._count += 1
        body = self._module_of(inner.attributes, inner.graph)
        made = Skippable(body, call.target) if call.op == "skippable" else Checkpointed(body, **dict(call.target))
        self.attributes[name] = made
        return self._create("call_module", name, args, {}, call)

    def _create(self, op: str, target: Any, args: Any, kwargs: Any, call: Call) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta[SOURCE] = call.source
        path = call.target if call.op == "call_module" and self._type_of(call.target) else call.path
        node.meta["nn_module_stack"] = {path: (path, self._type_of(path))}
        if call.only is not None:
            node.meta[ONLY] = call.only
        return node

    def _derived(self, function: Any, args: Any, origin: Call, op: str = "call_function") -> fx.Node:
        """Write an op that only looks at a value; it runs where that value is made."""
        node = self._create(op, function, args, {}, origin)
        self._looks.append(node)
        return node

    def _part(self, ref: Ref) -> fx.Node:
        if not ref.path:
            return self._nodes[ref.index]
        if ref not in self._parts:
            *before, (kind, key) = ref.path
            whole = self._part(Ref(ref.index, tuple(before)))
            self._parts[ref] = self._derived(_STEPS[kind], (whole, key), self._calls[ref.index])
        return self._parts[ref]

    def _number(self, expr: Expr) -> fx.Node:
        if expr not in self._numbers:
            self._numbers[expr] = self._computed(expr)
        return self._numbers[expr]

    def _computed(self, expr: Expr) -> fx.Node:
        if expr.name == "value":
            return self._part(expr.args[0])
        args = tuple(self.value(arg) for arg in expr.args)
        origin = self._calls[expr.refs()[0].index]
        if expr.name in ("size", "numel"):
            return self._derived(expr.name, args, origin, "call_method")
        return self._derived(getattr(operator, expr.name), args, origin)


def _modes_of_use(node: fx.Node, user: fx.Node) -> Iterator[tuple[str, bool] | None]:
    """List the modes, of modules by path, in which ``user`` needs ``node``; None stands for all."""
    given: Any = user.args
    if user.op == "output":
        in_training, in_evaluation = given[0]
        if in_evaluation is None:
            yield None
            return
        sides, owner = (in_training, in_evaluation), ""
    elif OWNER in user.meta and ONLY not in user.meta:
        sides, owner = ([given[0]], [given[1]]), user.meta[OWNER]
    else:
        yield user.meta.get(ONLY)
        return
    for side, training in zip(sides, (True, False)):
        if node in side:
            yield owner, training


def specialise(graph: fx.Graph, training: Callable[[str], bool]) -> fx.Graph:
    """Copy ``graph`` without the ops of the other mode; ``training`` tells the mode of a module by path.

    A switch between values is decided here; one between plain constants stays, and decides when the graph runs.
    """
    chosen = fx.Graph()
    known: dict[fx.Node, Any] = {}

    def use(node: fx.Node) -> Any:
        if node not in known:
            raise ShapeError(
                f"modules of the model are in modes in which it was not captured: {node.name} is computed only "
                f"{'in training' if node.meta[ONLY][1] else 'in evaluation'} of {node.meta[ONLY][0] or 'the model'}",
                hint="put the whole model into one mode: model.train() or model.eval()",
            )
        return known[node]

    for node in graph.nodes:
        only = node.meta.get(ONLY)
        if only is not None and training(only[0]) != only[1]:
            continue
        if OWNER in node.meta and is_structural(node):
            known[node] = fx.node.map_arg(node.args[0 if training(node.meta[OWNER]) else 1], use)
            continue
        if node.op == "output":
            in_training, in_evaluation = node.args[0]
            chosen.output(fx.node.map_arg(in_training if training("") or in_evaluation is None else in_evaluation, use))
            continue
        known[node] = chosen.node_copy(node, use)
    return chosen


def is_structural(node: fx.Node) -> bool:
    """Say whether a switch chooses between values of the graph."""
    return bool(node.all_input_nodes)
