"""Prices from a roofline: for devices that are not there, and ops that do not run on made-up inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...structure import map_leaves, tensors_in
from ..analysis import OpFacts, stand_in
from ..cluster import DeviceKind
from ..meter import Kernel, MemoryMeter, bytes_of
from ..recording.state import untouched
from .isolated import Isolated, Timed, cloned
from .op_cost import FREE, OpCost, is_free


@dataclass(frozen=True)
class _Backward:
    """What a backward runs: for all gradients, for those of inputs alone, and what both passes need besides results."""

    kernels: list[Kernel]
    input_kernels: list[Kernel]
    workspace_bytes: int


def analytic_costs(graph_module: fx.GraphModule, facts: dict[str, OpFacts], kind: DeviceKind) -> dict[str, OpCost]:
    """Price every op by a roofline: the forward by its facts, the backward by running it on fake tensors.

    The backward runs twice, for all gradients and for those of inputs that do not come from parameters alone; the
    difference is the price of the parameters' gradients. The roofline is that of Williams, Waterman and Patterson, 2009
    (https://doi.org/10.1145/1498765.1498785), applied to each kernel. Linear in the kernels of distinct ops.
    """
    with untouched(graph_module):
        return _analytic_costs(graph_module, facts, kind)


def _analytic_costs(graph_module: fx.GraphModule, facts: dict[str, OpFacts], kind: DeviceKind) -> dict[str, OpCost]:
    known: dict[str, OpCost] = {}
    costs: dict[str, OpCost] = {}
    constant = from_parameters(graph_module.graph, facts)
    for node in graph_module.graph.nodes:
        if node.op == "output" or is_free(facts[node.name]):
            costs[node.name] = FREE
            continue
        isolated = Isolated(node, graph_module, facts)
        weights = {position: i.name for position, i in enumerate(node.all_input_nodes) if i.name in constant}
        signature = isolated.signature(f"{kind.name}/weights at {list(weights)}")
        if signature not in known:
            known[signature] = _cost(isolated, set(weights.values()), kind)
        costs[node.name] = known[signature]
    costs.pop("output", None)
    return costs


def from_parameters(graph: fx.Graph, facts: dict[str, OpFacts]) -> set[str]:
    """Name the nodes whose values come from no tensor of an input: parameters, and a weight that is sliced, say."""
    names: set[str] = set()
    for node in graph.nodes:
        tensors = [i.name for i in node.all_input_nodes if tensors_in(facts[i.name].value) or i.op == "get_attr"]
        if node.op not in ("placeholder", "output") and all(name in names for name in tensors):
            names.add(node.name)
    return names


def roofline_s(kind: DeviceKind, kernels: Sequence[Kernel]) -> float:
    """Return the seconds that the roofline of ``kind`` allows, one kernel after the other."""
    arithmetic = (kernel.flops / kind.rate(kernel.dtype) if kernel.flops else 0.0 for kernel in kernels)
    return sum(
        (
            max(compute_s, kernel.moved_bytes / kind.bytes_per_s) + kind.kernel_overhead_s
            for kernel, compute_s in zip(kernels, arithmetic)
        ),
        0.0,
    )


def _cost(isolated: Isolated, weights: set[str], kind: DeviceKind) -> OpCost:
    """Price an op; where its backward does not run by itself on fake tensors, guess it from the forward.

    Then two forwards stand for the backward, one of them for the gradients of parameters if it has any, and all that
    the forward moves, twice over, for its workspace.
    """
    own = isolated.facts[isolated.node.name]
    forward_s = roofline_s(kind, own.kernels)
    backward = _fake_backward(isolated, weights)
    if backward is None:
        weight_s = forward_s if own.parameters else 0.0
        return OpCost(forward_s, 2 * forward_s, "analytic", weight_s, 2 * own.moved_bytes)
    backward_s = roofline_s(kind, backward.kernels)
    weight_s = max(0.0, backward_s - roofline_s(kind, backward.input_kernels))
    return OpCost(forward_s, backward_s, "analytic", weight_s, backward.workspace_bytes)


def analytic_call(call: Timed, kind: DeviceKind) -> tuple[float, float]:
    """Price one call, forward and backward, by running it on fake tensors.

    Raises:
        Exception: what the call raises there.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        wanted: list[torch.Tensor] = []

        def make(tensor: torch.Tensor) -> torch.Tensor:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            wanted.extend([made.requires_grad_()] if tensor.requires_grad else [])
            return made

        args, kwargs = call.inputs(make)
        function, _ = call.standalone(torch.device("cpu"))
        with MemoryMeter() as meter:
            outputs = function(*args, **kwargs)
            forward = list(meter.kernels)
            backward, _ = _gradients(meter, outputs, wanted, len(wanted))
    return roofline_s(kind, forward), roofline_s(kind, backward)


def _fake_backward(isolated: Isolated, weights: set[str]) -> _Backward | None:
    """Run the op forward and backward without data; None if it does not run."""
    with suppress(Exception), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        of_weights = {id(t) for name in weights for t in tensors_in(isolated.facts[name].value)}
        inputs: list[torch.Tensor] = []
        parameters: list[torch.Tensor] = []

        def make(tensor: torch.Tensor) -> torch.Tensor:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            (parameters if id(tensor) in of_weights else inputs).append(made.requires_grad_(tensor.requires_grad))
            return made

        args, kwargs = isolated.inputs(make)
        state = isolated.state(lambda tensor: stand_in(fake, tensor))
        if isolated.writes_inputs:
            args, kwargs = map_leaves(cloned, (args, kwargs))
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        parameters = [tensor for tensor in (*parameters, *state.values()) if tensor.requires_grad]
        with MemoryMeter() as meter:
            outputs = isolated.call(args, kwargs, state)
            workspace_bytes = meter.peak_bytes - meter.live_bytes
            both, needed = _gradients(meter, outputs, [*wanted, *parameters], len(wanted))
            alone = _gradients(meter, outputs, wanted, len(wanted))[0] if parameters else both
        return _Backward(both, alone, max(workspace_bytes, needed))
    return None


def _gradients(meter: MemoryMeter, outputs: Any, wanted: list[torch.Tensor], n_inputs: int) -> tuple[list[Kernel], int]:
    """Run the backward; return its kernels, and its memory beyond the gradients of the first ``n_inputs`` tensors."""
    roots = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    if not roots or not wanted:
        return [], 0
    given = [torch.ones_like(root) for root in roots]
    meter.reset()
    gradients = torch.autograd.grad(roots, wanted, given, allow_unused=True, retain_graph=True)
    results = sum(bytes_of(gradient) for gradient in gradients[:n_inputs] if gradient is not None)
    return list(meter.kernels), max(0, meter.peak_bytes - results)
