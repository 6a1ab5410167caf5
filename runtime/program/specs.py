"""What the runtime is given: stages as plain records of graph nodes, and the wires between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...structure import Structure
from ..instructions import Layout


@dataclass(frozen=True, slots=True)
class NodeRef:
    """A reference, inside a node's arguments, to the value of another node."""

    name: str


@dataclass(frozen=True)
class NodeRecord:
    """One torch.fx node without its graph, so that it can be sent to another process.

    ``random`` marks nodes that draw random numbers; they are seeded by (seed, microbatch, node name), so the same
    division into microbatches gives the same numbers wherever the node runs.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module_path: str = ""
    random: bool = False


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
        mode_owners: for each leaf module, the module of the user's model whose train() and eval() it follows.
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
    mode_owners: dict[str, str] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        """Say whether this stage holds the model's result, and so the loss."""
        return self.output_structure is not None


@dataclass(frozen=True)
class InputLeaf:
    """One leaf of a call's arguments.

    ``graph_input`` names the input of the graph, or is None for a leaf that is not a tensor; such a leaf keeps the
    value ``constant`` that it had when the model was captured. ``batched`` tensors are cut along dimension 0.
    """

    path: str
    graph_input: str | None
    constant: Any = None
    batched: bool = False


@dataclass(frozen=True)
class InputSpec:
    """The arguments that the captured model takes."""

    structure: Structure
    leaves: tuple[InputLeaf, ...]


@dataclass(frozen=True)
class PipelineSpec:
    """A model that has been cut: what the runtime launches.

    Attributes:
        stages: one spec per stage.
        layout: who owns which stage, and who talks to whom.
        devices: per worker, its device as torch names it.
        schedule: name of the training schedule.
        microbatches_per_replica: pieces that each replica of the widest stage is given.
        whole: the uncut graph as one stage, the reference that ``verify`` uses where random numbers are drawn.
        inputs: how a call's arguments become graph inputs.
        random: whether some op draws random numbers.
        fingerprint: equal for equal graphs and plans; ranks compare it before the first message.
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
