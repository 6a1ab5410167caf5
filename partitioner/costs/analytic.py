"""Prices from a roofline: for devices that are not there, and ops that do not run on made-up inputs."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...structure import map_leaves
from ..analysis import Meter, OpFacts
from ..cluster import DeviceKind
from ..recording.state import untouched
from .isolated import Isolated, cloned, run_backward, wanted_gradients
from .op_cost import FREE, OpCost, is_free


def analytic_costs(graph_module: fx.GraphModule, facts: dict[str, OpFacts], kind: DeviceKind) -> dict[str, OpCost]:
    """Price every op by a roofline: the forward by its facts, the backward by running it on fake tensors.

    The roofline is that of Williams, Waterman and Patterson, 2009 (https://doi.org/10.1145/1498765.1498785).
    """
    with untouched(graph_module):
        return _analytic_costs(graph_module, facts, kind)


def _analytic_costs(graph_module: fx.GraphModule, facts: dict[str, OpFacts], kind: DeviceKind) -> dict[str, OpCost]:
    known: dict[str, OpCost] = {}
    costs: dict[str, OpCost] = {}
    for node in graph_module.graph.nodes:
        if node.op == "output" or is_free(facts[node.name]):
            costs[node.name] = FREE
            continue
        isolated = Isolated(node, graph_module, facts)
        signature = isolated.signature(kind.name)
        if signature not in known:
            own = facts[node.name]
            forward_s = roofline_s(kind, own.flops, own.moved_bytes, own.n_kernels)
            known[signature] = OpCost(forward_s, _fake_backward_s(isolated, kind, forward_s), "analytic")
        costs[node.name] = known[signature]
    costs.pop("output", None)
    return costs


def roofline_s(kind: DeviceKind, flops: int, moved_bytes: int, n_kernels: int) -> float:
    """Return the seconds that the roofline of ``kind`` allows."""
    return max(flops / kind.rate("float32"), moved_bytes / kind.bytes_per_s) + n_kernels * kind.kernel_overhead_s


def _fake_backward_s(isolated: Isolated, kind: DeviceKind, forward_s: float) -> float:
    """Price the backward; where an op does not run by itself on fake tensors, two forwards stand for it."""
    with suppress(Exception), FakeTensorMode(allow_non_fake_inputs=True) as fake:

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            return fake.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)

        def make(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).requires_grad_(
                tensor.requires_grad
            )

        args, kwargs = isolated.inputs(make)
        state = isolated.state(copy)
        wanted = wanted_gradients(isolated, args, kwargs, state)
        if isolated.writes_inputs:
            args, kwargs = map_leaves(cloned, (args, kwargs))
        outputs = isolated.call(args, kwargs, state)
        with Meter() as meter:
            run_backward(outputs, wanted)
        return roofline_s(kind, meter.flops, meter.moved_bytes, meter.n_kernels)
    return 2 * forward_s
