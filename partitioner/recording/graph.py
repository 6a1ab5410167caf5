"""A graph module that can be copied and sent: torch.fx's own is pickled as code, which cannot name regions."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from ...runtime.program.specs import NodeRef
from .emit import ONLY, OWNER, SOURCE

_KEPT = (SOURCE, ONLY, OWNER, "nn_module_stack")
_Record = tuple[str, str, Any, Any, Any, dict[str, Any]]


class CapturedGraph(fx.GraphModule):
    """A torch.fx graph module over the modules of ``model``: a buffer or mode that changes there changes here."""

    def __init__(self, root: Any, graph: fx.Graph, class_name: str, model: nn.Module) -> None:
        super().__init__(root, graph, class_name)
        self.__dict__["_made_of"] = (class_name, model)
        for name, child in model.named_children():
            if name in self._modules:
                self._modules[name] = child

    def __reduce__(self) -> Any:
        class_name, model = self.__dict__["_made_of"]
        targets = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        attributes = {target: _attribute(self, target) for target in sorted(targets)}
        return _rebuilt, (_records(self.graph), attributes, class_name, model, self.training)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedGraph:
        rebuild, parts = self.__reduce__()
        copied: CapturedGraph = rebuild(*copy.deepcopy(parts, memo))
        memo[id(self)] = copied
        return copied


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _records(graph: fx.Graph) -> list[_Record]:
    def refer(leaf: Any) -> Any:
        return NodeRef(leaf.name) if isinstance(leaf, fx.Node) else leaf

    return [
        (
            node.op,
            node.name,
            node.target,
            fx.node.map_aggregate(node.args, refer),
            fx.node.map_aggregate(node.kwargs, refer),
            {key: node.meta[key] for key in _KEPT if key in node.meta},
        )
        for node in graph.nodes
    ]


def _rebuilt(
    records: list[_Record], attributes: dict[str, Any], class_name: str, model: nn.Module, training: bool
) -> CapturedGraph:
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}

    def resolve(leaf: Any) -> Any:
        return known[leaf.name] if isinstance(leaf, NodeRef) else leaf

    for op, name, target, args, kwargs, meta in records:
        own_args, own_kwargs = (fx.node.map_aggregate(value, resolve) for value in (args, kwargs))
        known[name] = graph.create_node(op, target, tuple(own_args), dict(own_kwargs), name)
        known[name].meta.update(meta)
    made = CapturedGraph(attributes, graph, class_name, model)
    made.training = training
    return made
