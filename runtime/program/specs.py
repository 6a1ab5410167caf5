"""What the runtime is given: stages as plain records of graph nodes, and the wires between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...structure import Structure
from ..instructions import Action, Layout


@dataclass(frozen=True, slots=True)
class NodeRef:
    """A reference, inside a node's arguments, to the value of another node."""

    name: str


@dataclass(frozen=True)
class NodeRecord:
    """One torch.fx node without its graph, so that it can be sent to another process.

    ``random`` marks nodes that draw random numbers; they are seeded by (seed, microbatch, node name), so the same
    division into microbatches gives the same numbers wherever the node runs. ``only`` names the module of the user's
    model whose mode decides whether the node runs, and the mode. A node with ``op`` "switch" stands for the first of
    its arguments while the module ``target`` trains, else for the second.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module_path: str = ""
    random: bool = False
    only: tuple[str, bool] | None = None


@dataclass(frozen=True)
class WireGroup:
    """The values that travel together between this stage and one other stage, one packet per microbatch."""

    stage: int
    values: tuple[str, ...]


@dataclass(frozen=True)
class OutputLeaf:
    """One leaf of the model's result: the value of a node, or a constant."""

    node: str | None
    constant: Any = None


@dataclass(frozen=True)
class StageSpec:
    """Everything that a worker needs to run one stage.

    Attributes:
        index: the stage, counted from 0.
        nodes: the stage's ops in order.
        modules: leaf modules by path; tensors inside are shared with the owner of the parameters.
        attributes: parameters and buffers that ops use directly, by path.
        graph_inputs: names of the model inputs that the stage uses.
        wires_in: packets received, by producing stage.
        wires_out: packets sent, by consuming stage.
        outputs: leaves of the model's result, only on the last stage.
        output_structure: nesting of the model's result, only on the last stage.
        evaluated: the same two for evaluation, where they are others.
        mode_owners: for each leaf module, the module of the user's model whose train() and eval() it follows.
        captured_on: the device that the model was captured on; where ops name it, they mean the stage's own.
        recompute: keep only the inputs of a microbatch, and compute its activations again in its backward.
    """

    index: int
    nodes: tuple[NodeRecord, ...]
    modules: dict[str, nn.Module]
    attributes: dict[str, Any]
    graph_inputs: tuple[str, ...]
    wires_in: tuple[WireGroup, ...]
    wires_out: tuple[WireGroup, ...]
    outputs: tuple[OutputLeaf, ...] = ()
    output_structure: Structure | None = None
    evaluated: tuple[tuple[OutputLeaf, ...], Structure] | None = None
    mode_owners: dict[str, str] = field(default_factory=dict)
    captured_on: str | None = None
    recompute: bool = False

    @property
    def is_last(self) -> bool:
        """Say whether this stage holds the model's result, and so the loss."""
        return self.output_structure is not None

    def result(self, training: bool) -> tuple[tuple[OutputLeaf, ...], Structure]:
        """Return the leaves and the nesting of the model's result in a mode (last stage only)."""
        assert self.output_structure is not None
        return self.evaluated if self.evaluated and not training else (self.outputs, self.output_structure)

    @property
    def deciding(self) -> tuple[str, ...]:
        """List the modules of the user's model whose modes decide which nodes run."""
        owners = [node.target for node in self.nodes if node.op == "switch"]
        return tuple(dict.fromkeys([*owners, *(node.only[0] for node in self.nodes if node.only is not None), ""]))


@dataclass(frozen=True)
class InputLeaf:
    """One leaf of a call's arguments.

    ``graph_input`` names the input of the graph, or is None for a leaf that is not a tensor; such a leaf keeps the
    value ``constant`` that it had when the model was captured. ``batched`` tensors are cut along dimension 0. ``shape``
    holds the sizes that a tensor must have, None where any size will do. ``same_as`` is the place, among the leaves, of
    an earlier one that was the same tensor; ``dtype`` is what a tensor's must be, None where any will do.
    """

    path: str
    graph_input: str | None
    constant: Any = None
    batched: bool = False
    shape: tuple[int | None, ...] | None = None
    same_as: int | None = None
    dtype: torch.dtype | None = None

    def mismatch(self, leaf: Any) -> str | None:
        """Say how ``leaf`` differs from what the model was captured for, or None."""
        if self.graph_input is None:
            if _same_constant(self.constant, leaf):
                return None
            return (
                f"argument {self.path!r} was {self.constant!r} when the model was captured and is {leaf!r} now; "
                "values that are not tensors are part of the captured graph"
            )
        if not isinstance(leaf, torch.Tensor):
            return f"argument {self.path!r} must be a tensor, got {type(leaf).__name__}"
        if self.dtype is not None and leaf.dtype != self.dtype:
            return f"argument {self.path!r} is {leaf.dtype}; the model was captured for {self.dtype}"
        if self.shape is None or _fits(self.shape, tuple(leaf.shape)):
            return None
        known = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"argument {self.path!r} has shape {tuple(leaf.shape)}; the model was captured for ({known})"


def _fits(wanted: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(wanted) == len(shape) and all(size in (None, given) for size, given in zip(wanted, shape))


def _same_constant(known: Any, given: Any) -> bool:
    if known is given:
        return True
    if isinstance(known, float) and isinstance(given, float) and math.isnan(known):
        return math.isnan(given)
    try:
        return type(known) is type(given) and bool(known == given)
    except Exception:
        return False


@dataclass(frozen=True)
class InputSpec:
    """The arguments that the captured model takes. ``rows`` is the only batch size, or None where any will do."""

    structure: Structure
    leaves: tuple[InputLeaf, ...]
    rows: int | None = None

    def mismatch(self, leaves: Sequence[Any]) -> str | None:
        """Say how ``leaves`` differ from those that the model was captured for, or None."""
        for known, leaf in zip(self.leaves, leaves):
            problem = known.mismatch(leaf)
            if problem is not None:
                return problem
            if known.batched and self.rows is not None and leaf.shape[0] != self.rows:
                return f"argument {known.path!r} has {leaf.shape[0]} rows; the model runs for {self.rows} only"
        first = {id(leaf): index for index, leaf in reversed(list(enumerate(leaves))) if isinstance(leaf, torch.Tensor)}
        for index, (known, leaf) in enumerate(zip(self.leaves, leaves)):
            same = first.get(id(leaf), index)
            if known.graph_input is not None and same != (index if known.same_as is None else known.same_as):
                return f"argument {known.path!r} is the same tensor as another argument, or was when it was captured"
        return None


@dataclass(frozen=True)
class PipelineSpec:
    """A model that has been cut: what the runtime launches.

    Attributes:
        stages: one spec per stage.
        layout: who owns which stage, and who talks to whom.
        devices: per worker, its device as torch names it.
        schedule: name of the training schedule.
        orders: that schedule, for the workers of one replica, where it is none of those known by name.
        microbatches_per_replica: pieces that each replica of the widest stage is given.
        whole: the uncut graph as one stage, the reference that ``verify`` uses where random numbers are drawn.
        inputs: how a call's arguments become graph inputs.
        random: whether some op draws random numbers.
        fingerprint: equal for equal graphs and plans; ranks compare it before the first message.
        n_threads: CPU threads that each local worker computes with.
        step_s: seconds of a step as the plan predicts them; 0 if nobody did.
        worker_bytes: what the plan expects each local worker to hold at its fullest.
    """

    stages: tuple[StageSpec, ...]
    layout: Layout
    devices: tuple[str, ...]
    schedule: str
    microbatches_per_replica: int
    whole: StageSpec
    inputs: InputSpec
    random: bool
    fingerprint: str
    n_threads: int = 1
    orders: tuple[tuple[Action, ...], ...] = ()
    step_s: float = 0.0
    worker_bytes: tuple[int, ...] = ()
