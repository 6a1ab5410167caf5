"""Other ways to get a graph of a model, each given its best chance, behind the same interface as stagecut's capture."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from .balance import graph_flops, repeated_blocks
from .judge import Subject


class _Flat(nn.Module):
    """Calls a model with the tensors of a call only; what else there is in the call is constant."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.spec = _pytree.tree_flatten((args, kwargs))
        self.places = [index for index, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    def call(self, tensors: tuple[Any, ...]) -> Any:
        """Put the tensors to their places and call the model."""
        leaves = list(self.leaves)
        for index, tensor in zip(self.places, tensors):
            leaves[index] = tensor
        args, kwargs = _pytree.tree_unflatten(leaves, self.spec)
        return self.model(*args, **kwargs)


class _Unflat(nn.Module):
    """Calls a graph of :class:`_Flat` as the model is called."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module
        self.graph = module.graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*[leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])


def fx_subject(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Subject, dict[str, Any]]:
    """Trace with ``torch.fx``; what the call leaves out, and what of it is no tensor, is constant."""
    flat = _Flat(model, args, kwargs)
    names = ", ".join(f"tensor_{index}" for index in range(len(flat.places)))
    # A tracer reads the names of the arguments from the class's forward, so it has to have that many.
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {names}):\n    return self.call(({names},))", scope)
    flat.__class__ = type("Flat", (_Flat,), {"forward": scope["forward"]})
    module = fx.symbolic_trace(flat)
    return Subject(_Unflat(module), model), {"kind": "whole", "n_ops": _n_ops(module.graph)}


def export_subject(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Subject, dict[str, Any]]:
    """Export with a dynamic batch dimension, or, where that is refused, with the example's sizes."""
    facts: dict[str, Any] = {"kind": "whole"}
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=_dynamic(model, args, kwargs), strict=False)
    except Exception as error:
        facts["dynamic"] = _first_line(error)
        program = torch.export.export(model, args, kwargs, strict=False)
    module = program.module()
    facts["n_ops"] = _n_ops(module.graph)
    return Subject(module, _renamed(model, module)), facts


def pipelining_subject(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Subject, dict[str, Any]]:
    """Cut in two before the middle one of the repeated blocks with ``torch.distributed.pipelining``."""
    from torch.distributed.pipelining import SplitPoint, pipeline

    blocks = repeated_blocks(model) or [name for name, _ in model.named_children()]
    middle = blocks[len(blocks) // 2]
    pipe = pipeline(model, args, kwargs, split_spec={middle: SplitPoint.BEGINNING})
    if pipe.num_stages != 2:
        raise RuntimeError(f"asked for 2 stages, got {pipe.num_stages}")
    # The executor that it comes with detaches what goes from stage to stage, so its gradients end at the cut.
    pipe.executor = fx.Interpreter(pipe.split_gm)
    return Subject(pipe, _renamed(model, pipe.split_gm), flat=True), {"kind": "whole", "cut_before": middle}


def peer_flops(subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
    """Count FLOPs per node of a peer's graph."""
    leaves = _pytree.tree_leaves((args, kwargs))
    if isinstance(subject.module, _Unflat):
        return graph_flops(subject.module.module, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    return graph_flops(subject.module, leaves)


def _dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    first = next(leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim())
    batch = torch.export.Dim("batch", min=2, max=4096)

    def shape_of(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == first.shape[0]
        return {0: batch} if batched else None

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: _pytree.tree_map(shape_of, value) for name, value in bound.items()}


class _Renamed(nn.Module):
    """Shows a module's parameters and buffers under the names that they have in the model."""

    def __init__(self, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
        super().__init__()
        self._known = parameters, buffers

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        yield from self._known[0].items()

    def parameters(self, recurse: bool = True) -> Any:
        yield from self._known[0].values()

    def named_buffers(self, *_: Any, **__: Any) -> Any:
        yield from self._known[1].items()


def _renamed(model: nn.Module, module: nn.Module) -> nn.Module:
    """Find the model's tensors in a module that was made from it: the same object, or the same name after a prefix."""
    return _Renamed(
        _match(dict(model.named_parameters()), dict(module.named_parameters(remove_duplicate=False))),
        _match(dict(model.named_buffers()), dict(module.named_buffers(remove_duplicate=False))),
    )


def _match(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    same = {id(tensor) for tensor in found.values()}
    by_suffix = {name.partition(".")[2]: tensor for name, tensor in found.items()}
    matched = {}
    for name, tensor in wanted.items():
        if id(tensor) in same:
            matched[name] = tensor
        else:  # one that the graph does not use at all stays the model's
            matched[name] = found.get(name, by_suffix.get(name, tensor))
    return matched


def _n_ops(graph: fx.Graph) -> int:
    return sum(node.op.startswith("call_") and node.target is not operator.getitem for node in graph.nodes)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
