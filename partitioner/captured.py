"""What a capture gives: the graph, what it could not open, and a module that stands in for the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx, nn

from ..errors import ShapeError
from ..representation import html_of
from ..runtime.program import InputSpec, OutputLeaf
from ..runtime.program.calls import ModeSwitch
from ..runtime.program.recordable import why_not_node
from ..structure import Structure, call_leaves, unflatten
from .hidden import Hidden, hidden
from .recording.emit import ONLY, OWNER, is_structural, specialise
from .recording.graph import CapturedGraph
from .report import report
from .verification import CaptureCheck, verify

WHOLE_MODEL = ""


@dataclass(frozen=True)
class OpaqueCall:
    """A module that is kept whole: where it is in the model, why it could not be opened, and the line that decided.

    ``function`` is set where less is kept whole than a module: a function or method that the module at ``path`` calls.
    """

    path: str
    type_name: str
    reason: str
    source: str | None = None
    function: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """Return the path of the module, or that of the function with parentheses."""
        if self.function is None:
            return self.path
        return f"{self.path}.{self.function.__name__}()".removeprefix(".")

    def __str__(self) -> str:
        place = f" at {self.source}" if self.source else ""
        return f"{self.name or '(the whole model)'} ({self.type_name}): {self.reason}{place}"


@dataclass(frozen=True)
class ModelResult:
    """A result's leaves and their nesting."""

    leaves: tuple[OutputLeaf, ...]
    structure: Structure


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        model: the model that was captured; the graph refers to its modules and parameters.
        graph_module: the graph in training mode, over flat inputs (the tensor leaves of the arguments), returning the
            result's leaves.
        union: the graph of both modes; ops of one mode are marked, and switches choose between values. It gives
            the results of both.
        inputs: how a call's arguments become graph inputs.
        trained, evaluated: the result in training, and in evaluation.
        opaque: the modules that were kept whole, then the functions.
        mode_owners: for each leaf module of the union, the module of the model whose mode it follows.
        written: parameters and buffers that the forward changes in place.
        flops: forward FLOPs of the whole model (by the name ``""``) and of what is opaque, by its name, for a few rows;
            empty if nothing is opaque, or if they could not be counted.
        sets_itself_up: the forward changes attributes at a first call only; the graph is of the calls after it.
        device: where the model and the example are, if that is one device; ops of the graph name it.
    """

    model: nn.Module
    graph_module: fx.GraphModule
    union: fx.GraphModule
    inputs: InputSpec
    trained: ModelResult
    evaluated: ModelResult
    opaque: tuple[OpaqueCall, ...]
    mode_owners: dict[str, str]
    written: frozenset[str] = frozenset()
    flops: Mapping[str, int] = field(default_factory=dict)
    sets_itself_up: bool = False
    device: str | None = None

    @property
    def is_whole(self) -> bool:
        """Say whether the model is one opaque module."""
        return any(call.name == WHOLE_MODEL for call in self.opaque)

    @cached_property
    def kept_whole(self) -> frozenset[str]:
        """Name the ops that hold code which no recording stands for, so that their backward cannot be split."""
        return frozenset(n.name for n in self.graph.nodes if why_not_node(n, self.graph_module) is not None)

    @property
    def graph(self) -> fx.Graph:
        """Return the torch.fx graph of training."""
        return self.graph_module.graph

    @property
    def outputs(self) -> tuple[OutputLeaf, ...]:
        """Return the leaves of the result in training, by their names in ``graph``."""
        names = iter([node.name for node in next(iter(reversed(self.graph.nodes))).args[0]])
        return tuple(leaf if leaf.node is None else OutputLeaf(next(names)) for leaf in self.trained.leaves)

    @property
    def output_structure(self) -> Structure:
        """Return the nesting of the result in training."""
        return self.trained.structure

    @property
    def module(self) -> CapturedModule:
        """Return a module that is called like the model and computes by the captured graph."""
        return CapturedModule(self)

    def _repr_html_(self) -> str | None:
        return html_of("Capture", self)

    def report(self) -> str:
        """Say what was captured, what was kept whole and why, what to change, and which calls the graph is for."""
        return report(self)

    def hidden(self) -> tuple[Hidden, ...]:
        """Say for each opaque module how much of the model it hides from the cut."""
        return hidden(self)

    def verify(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        seeds: Sequence[int] = (0, 1),
        rows: int | None = None,
    ) -> CaptureCheck:
        """Compare results, gradients, parameters and buffers of graph and model, on copies of both.

        The example runs in training from each of ``seeds``, and in evaluation; then with another number of ``rows``,
        cut or repeated from the example, in both modes. Model, arguments and random state are left as they are.

        Raises:
            CaptureError: the model cannot be copied, or has no data.
        """
        return verify(self, args, kwargs or {}, seeds, rows)


class CapturedModule(nn.Module):
    """The captured graph behind the model's own signature, with the model's own parameters, buffers and modules."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        model = capture.model
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = model.__dict__[kind]
        self.training = model.training
        self._capture = (capture,)
        self._variants: tuple[dict[tuple[bool, ...], fx.GraphModule]] = ({},)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Flatten the arguments, run the graph, rebuild the result.

        Raises:
            ShapeError: the arguments differ from those of the capture in more than tensor values and batch size.
        """
        (capture,) = self._capture
        if capture.is_whole:
            return capture.model(*args, **kwargs)
        leaves, structure = call_leaves(capture.model.forward, args, kwargs)
        if structure != capture.inputs.structure:
            raise ShapeError("the call's arguments are nested in another way than those of the capture")
        problem = capture.inputs.mismatch(leaves)
        if problem is not None:
            raise ShapeError(problem, hint="stagecut.capture(model, args, kwargs) with the new arguments")
        tensors = [leaf for known, leaf in zip(capture.inputs.leaves, leaves) if known.graph_input is not None]
        values = list(self._graph_module(capture)(*tensors))
        result = capture.trained if self._mode("") else capture.evaluated
        given = [leaf.constant if leaf.node is None else values.pop(0) for leaf in result.leaves]
        return unflatten(result.structure, given)

    def train(self, mode: bool = True) -> CapturedModule:
        """Set the mode of the model, whose modules these are."""
        self._capture[0].model.train(mode)
        self.training = mode
        return self

    def _mode(self, path: str) -> bool:
        return self._capture[0].model.get_submodule(path).training

    def _graph_module(self, capture: Capture) -> fx.GraphModule:
        """Choose the graph for the present modes, and set the switches."""
        for module in (capture.union, capture.graph_module):
            for switch in module.children():
                if isinstance(switch, ModeSwitch):
                    switch.training = self._mode(switch.owner)
        owners = deciding_modules(capture.union.graph)
        modes = tuple(self._mode(owner) for owner in owners)
        if all(modes):
            return capture.graph_module
        (variants,) = self._variants
        if modes not in variants:
            graph = specialise(capture.union.graph, dict(zip(owners, modes)).__getitem__)
            variants[modes] = CapturedGraph(capture.union, graph, type(self).__name__, capture.model)
        return variants[modes]


def has_modes(union: fx.Graph) -> bool:
    """Say whether some ops of ``union`` run in one mode only."""
    return any(ONLY in node.meta or (OWNER in node.meta and is_structural(node)) for node in union.nodes)


def deciding_modules(union: fx.Graph) -> list[str]:
    """List the modules whose mode decides which ops of ``union`` run."""
    owners = {"": None}
    for node in union.nodes:
        if ONLY in node.meta:
            owners[node.meta[ONLY][0]] = None
        elif OWNER in node.meta and is_structural(node):
            owners[node.meta[OWNER]] = None
    return list(owners)
