"""Capture: any ``nn.Module`` becomes a torch.fx graph; what cannot be traced becomes one opaque call, with a report."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..errors import CaptureError
from ..runtime.program import InputLeaf, InputSpec, OutputLeaf
from ..structure import LEAF, Structure, call_leaves, flatten, leaf_paths, tensors_in, unflatten
from .modes import ModeSwitch, equal_values, merge_modes
from .tracing import Tracer, TraceRefused, put_back

WHOLE_MODEL = ""
_CHECK_ROWS = 2


@dataclass(frozen=True)
class OpaqueCall:
    """A module that is kept whole: where it is in the model, and why it could not be opened."""

    path: str
    type_name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or '(the whole model)'} ({self.type_name}): {self.reason}"


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        model: the model that was captured; the graph refers to its modules and parameters.
        graph_module: the graph over flat inputs (the tensor leaves of the arguments), returning the result's leaves.
        inputs: how a call's arguments become graph inputs.
        outputs: the result's leaves.
        output_structure: the result's nesting.
        opaque: the modules that were kept whole.
        mode_owners: for each leaf module, the module of the model whose mode it follows.
    """

    model: nn.Module
    graph_module: fx.GraphModule
    inputs: InputSpec
    outputs: tuple[OutputLeaf, ...]
    output_structure: Structure
    opaque: tuple[OpaqueCall, ...]
    mode_owners: dict[str, str]

    @property
    def graph(self) -> fx.Graph:
        """Return the torch.fx graph."""
        return self.graph_module.graph

    @property
    def module(self) -> CapturedModule:
        """Return a module that is called like the model and computes by the captured graph."""
        return CapturedModule(self)

    def report(self) -> str:
        """Say what was captured, and what was kept whole and why."""
        n_ops = sum(1 for node in self.graph.nodes if node.op.startswith("call_"))
        lines = [f"captured {type(self.model).__name__}: {n_ops} ops, {len(self.opaque)} opaque"]
        return "\n".join(lines + [f"  opaque {call}" for call in self.opaque])


class CapturedModule(nn.Module):
    """The captured graph behind the model's own signature."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self.graph_module = capture.graph_module
        self._capture = (capture,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Flatten the arguments, run the graph, rebuild the result."""
        (capture,) = self._capture
        leaves, _ = call_leaves(capture.model.forward, args, kwargs)
        tensors = [leaf for known, leaf in zip(capture.inputs.leaves, leaves) if known.graph_input is not None]
        return unflatten(capture.output_structure, self.graph_module(*tensors))


def capture(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, opaque: Sequence[str] = ()
) -> Capture:
    """Capture ``model`` as it is called with ``args`` and ``kwargs``.

    The batch is dimension 0 of the first tensor argument, and stays free; every argument that has as many rows is taken
    to be batched. Values that are not tensors become part of the graph. Modules named in ``opaque`` are kept whole,
    as are, one by one, those that cannot be traced. ``model`` is not changed.

    Raises:
        CaptureError: an argument is not usable, or ``opaque`` names no module of the model.
    """
    kwargs = kwargs or {}
    modules = dict(model.named_modules())
    for path in opaque:
        if path not in modules:
            raise CaptureError(f"opaque names {path!r}, which is not a module of {type(model).__name__}")
    leaves, structure = call_leaves(model.forward, args, kwargs)
    inputs = _input_spec(leaves, structure, leaf_paths(model.forward, args, kwargs))
    found = [OpaqueCall(path, type(modules[path]).__name__, "asked for") for path in opaque]
    with _own_random_state():
        result = _Ladder(model, inputs, found).climb()
        if _agrees(result, args, kwargs):
            return result
        warnings.warn(
            f"stagecut: the graph captured from {type(model).__name__} computes something else than the model, "
            "so the model is kept whole and cannot be cut; compile(..., opaque=[...]) can name the module to keep "
            "instead",
            stacklevel=2,
        )
        reason = "the captured graph computed something else than the model"
        return _Ladder(model, inputs, [OpaqueCall(WHOLE_MODEL, type(model).__name__, reason)]).climb()


def _input_spec(leaves: list[Any], structure: Structure, paths: list[str]) -> InputSpec:
    rows = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
    if rows is None:
        raise CaptureError(
            "the example call has no tensor argument with a batch dimension",
            hint="pass example inputs whose first tensor has the samples in dimension 0",
        )
    known: list[InputLeaf] = []
    used: set[str] = set()
    for path, leaf in zip(paths, leaves):
        if not isinstance(leaf, torch.Tensor):
            known.append(InputLeaf(path, None, leaf))
            continue
        name = _unused(re.sub(r"\W", "_", path), used)
        known.append(InputLeaf(path, name, None, leaf.dim() > 0 and leaf.shape[0] == rows))
    return InputSpec(structure, tuple(known))


def _unused(name: str, used: set[str]) -> str:
    while name in used:
        name += "_"
    used.add(name)
    return name


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Leave the process's random state as it was."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave the attributes of the model's modules and the process's random state as they were."""
    with _own_random_state(), put_back(model):
        yield


class _Ladder:
    """Trace, and keep one more module whole for every reason that tracing fails, until it succeeds."""

    def __init__(self, model: nn.Module, inputs: InputSpec, opaque: list[OpaqueCall]) -> None:
        self.model = model
        self.inputs = inputs
        self.opaque = {call.path: call for call in opaque}

    def climb(self) -> Capture:
        while WHOLE_MODEL not in self.opaque:
            trained = self._trace(training=True)
            evaluated = self._trace(training=False) if trained is not None else None
            if trained is None or evaluated is None:
                continue
            same_result = trained[1] == evaluated[1]
            differing = merge_modes(trained[0], evaluated[0]) if same_result else WHOLE_MODEL
            if differing is None:
                return self._finish(*trained)
            self._keep_whole(differing, "its graph in training differs from that in evaluation")
        return self._finish(*self._whole())

    def _trace(self, *, training: bool) -> tuple[fx.Graph, Structure] | None:
        tracer = Tracer(set(self.opaque))
        names = [leaf.graph_input for leaf in self.inputs.leaves]
        constants = [leaf.constant for leaf in self.inputs.leaves]
        with _in_mode(self.model, training), put_back(self.model):
            try:
                return tracer.trace_call(self.model, self.inputs.structure, names, constants)
            except Exception as error:
                reason = error.reason if isinstance(error, TraceRefused) else _first_line(error)
                self._keep_whole(tracer.failed_at or WHOLE_MODEL, reason)
                return None

    def _keep_whole(self, path: str, reason: str) -> None:
        while path in self.opaque and path:
            path = path.rpartition(".")[0]
        module = self.model.get_submodule(path)
        self.opaque[path] = OpaqueCall(path, type(module).__name__, reason)

    def _whole(self) -> tuple[fx.Graph, Structure]:
        graph = fx.Graph()
        leaves = [
            leaf.constant if leaf.graph_input is None else graph.placeholder(leaf.graph_input)
            for leaf in self.inputs.leaves
        ]
        args, kwargs = unflatten(self.inputs.structure, leaves)
        result = graph.call_module("model", args, kwargs)
        graph.output([result])
        return graph, LEAF

    def _finish(self, graph: fx.Graph, output_structure: Structure) -> Capture:
        opaque = tuple(call for path, call in self.opaque.items() if not self._inside_opaque(path))
        root: Any = nn.ModuleDict({"model": self.model}) if WHOLE_MODEL in self.opaque else self.model
        switches = {node.target: node.meta["mode_owner"] for node in graph.nodes if "mode_owner" in node.meta}
        called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        targets = dict.fromkeys(path for path in called if path not in switches)
        owners = {path: "" if WHOLE_MODEL in self.opaque else path for path in targets} | switches
        attributes: dict[str, Any] = {path: root.get_submodule(path) for path in targets}
        for path, owner in switches.items():
            attributes[path] = ModeSwitch().train(self.model.get_submodule(owner).training)
        for node in graph.nodes:
            if node.op == "get_attr":
                attributes[node.target] = _attribute(root, node.target)
        graph_module = fx.GraphModule(attributes, graph, class_name=f"Captured{type(self.model).__name__}")
        output = next(node for node in graph.nodes if node.op == "output")
        outputs = tuple(
            OutputLeaf(leaf.name) if isinstance(leaf, fx.Node) else OutputLeaf(None, leaf) for leaf in output.args[0]
        )
        return Capture(self.model, graph_module, self._named_inputs(graph), outputs, output_structure, opaque, owners)

    def _inside_opaque(self, path: str) -> bool:
        parts = path.split(".") if path else []
        return any(".".join(parts[:count]) in self.opaque for count in range(len(parts)))

    def _named_inputs(self, graph: fx.Graph) -> InputSpec:
        """Take over the names that fx gave to the placeholders; it avoids Python's own, such as ``input``."""
        names = iter([node.name for node in graph.nodes if node.op == "placeholder"])
        leaves = [replace(leaf, graph_input=next(names)) if leaf.graph_input else leaf for leaf in self.inputs.leaves]
        return InputSpec(self.inputs.structure, tuple(leaves))


def _attribute(root: Any, path: str) -> Any:
    value = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = training
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _agrees(result: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Run model and graph once on a few rows, without gradients, from equal seeds and equal buffers, and compare."""
    if result.opaque and result.opaque[0].path == WHOLE_MODEL:
        return True
    tensors = tensors_in((args, kwargs)) + list(result.model.parameters())
    if any(tensor.is_meta for tensor in tensors):
        return True
    for rows in (_CHECK_ROWS, None):
        try:
            expected = _run(result, result.model, args, kwargs, rows)
        except Exception:
            continue
        try:
            given = _run(result, result.module, args, kwargs, rows)
        except Exception:
            return False
        return _close(expected, given)
    raise CaptureError(
        f"{type(result.model).__name__} fails on the example inputs by itself, before anything is cut",
        hint="call model(*example_inputs) to see the error",
    )


def _run(result: Capture, module: nn.Module, args: Any, kwargs: Any, rows: int | None) -> Any:
    leaves, structure = call_leaves(result.model.forward, args, kwargs)
    leaves = [
        leaf[:rows].detach().clone() if known.batched else leaf.detach().clone() if known.graph_input else leaf
        for known, leaf in zip(result.inputs.leaves, leaves)
    ]
    few_args, few_kwargs = unflatten(structure, leaves)
    buffers = [(buffer, buffer.clone()) for buffer in result.model.buffers()]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        with torch.enable_grad(), put_back(result.model):
            return module(*few_args, **few_kwargs)
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)


def _close(expected: Any, given: Any) -> bool:
    ours, structure = flatten(expected)
    theirs, other = flatten(given)
    return structure == other and all(_close_leaf(a, b) for a, b in zip(ours, theirs))


def _close_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
    return equal_values(a, b)
