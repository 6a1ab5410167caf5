"""The op graph: what can be cut, what must stay together, what a cut would cost; a networkx graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx, nn

from ..runtime.program.calls import ModeSwitch
from ..structure import tensors_in
from .analysis import OpFacts, parameters_read
from .captured import Capture, has_modes
from .cluster import Cluster
from .costs.op_cost import FREE, OpCost
from .meter import storage_of

# Weights, gradients and AdamW's two moments (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980).
STATE_COPIES = 4


@dataclass(frozen=True)
class OpNode:
    """One op that belongs to exactly one stage.

    ``inputs`` are the ops and graph inputs whose values it uses. ``parameters`` includes what it reads through the
    graph's attribute nodes, which are not ops of their own: every stage that needs one has it.
    """

    name: str
    target: str
    module_path: str
    source: str | None
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    output_bytes: int
    saved_bytes: int
    differentiable: bool


def is_replicable(node: fx.Node, module: fx.GraphModule) -> bool:
    """Say whether every stage that uses ``node`` gets its own: attributes and mode switches cost nothing."""
    if node.op == "get_attr":
        return True
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), ModeSwitch)


def is_switch(node: fx.Node, module: fx.GraphModule) -> bool:
    """Say whether ``node`` chooses between values of the graph by a module's mode."""
    return is_replicable(node, module) and node.op == "call_module" and bool(node.all_input_nodes)


def op_nodes(capture: Capture, facts: Mapping[str, OpFacts]) -> dict[str, OpNode]:
    """List the ops that a cut assigns to stages, in graph order."""
    module = capture.graph_module
    replicable = {node.name for node in capture.graph.nodes if is_replicable(node, module)}
    ops: dict[str, OpNode] = {}
    for node in capture.graph.nodes:
        if node.op in ("placeholder", "output") or node.name in replicable:
            continue
        own = facts[node.name]
        borrowed = [name for i in node.all_input_nodes if i.name in replicable for name in facts[i.name].parameters]
        ops[node.name] = OpNode(
            name=node.name,
            target=own.target,
            module_path=own.module_path,
            source=own.source,
            inputs=tuple(i for i in own.inputs if i not in replicable),
            parameters=tuple(dict.fromkeys([*own.parameters, *borrowed])),
            output_bytes=own.output_bytes,
            saved_bytes=own.saved_bytes,
            differentiable=own.differentiable,
        )
    return ops


def state_bytes(capture: Capture) -> dict[str, int]:
    """Return the bytes of every parameter and buffer of the model by name."""
    named = (*capture.model.named_parameters(), *capture.model.named_buffers())
    return {name: tensor.numel() * tensor.element_size() for name, tensor in named}


def held_state_bytes(capture: Capture) -> int:
    """Return the bytes of all that ops read of the model, each once, with gradients and optimizer state."""
    module, sizes, read = capture.graph_module, state_bytes(capture), parameters_read(capture)
    used: set[str] = set()
    for node in capture.graph.nodes:
        if node.op not in ("placeholder", "output") and not is_replicable(node, module):
            borrowed = [i.name for i in node.all_input_nodes if is_replicable(i, module)]
            used.update(name for own in (node.name, *borrowed) for name in read[own])
    trainable = _trainable(capture)
    return sum(sizes[name] * (STATE_COPIES if name in trainable else 1) for name in used)


def _trainable(capture: Capture) -> set[str]:
    named = capture.model.named_parameters()
    return {name for name, p in named if isinstance(p, nn.Parameter) and p.requires_grad}


def forced_together(
    capture: Capture, facts: Mapping[str, OpFacts], ops: Mapping[str, OpNode], travels: Mapping[str, bool]
) -> list[list[str]]:
    """List groups of ops that must share a stage.

    Two reasons. A value that cannot travel (no tensor, number or plain container of them) keeps its users with its
    producer. A storage that is changed in place keeps together its producer, its writers, and every reader up to the
    last write; later readers see the final value and may get a copy. Of an input or attribute every stage has its own,
    so one that is changed keeps all its readers.
    """
    groups: list[list[str]] = []
    users: dict[str, list[str]] = {}
    for op in ops.values():
        for name in op.inputs:
            users.setdefault(name, []).append(op.name)
    groups += [[name, *users.get(name, [])] for name in ops if not travels[name]]
    everywhere = {
        storage_of(tensor)
        for own in facts.values()
        if own.op in ("placeholder", "get_attr")
        for tensor in tensors_in(own.value)
    }
    for storage in {storage for own in facts.values() for storage in own.written}:
        touching = [name for name in ops if storage in facts[name].touched]
        last_write = max((i for i, name in enumerate(touching) if storage in facts[name].written), default=-1)
        groups.append(touching if storage in everywhere else touching[: last_write + 1])
    return sorted(group for group in groups if len(group) > 1)  # storages come in no order of their own


def ties(capture: Capture, ops: Mapping[str, OpNode]) -> dict[str, tuple[str, ...]]:
    """Return, per parameter that several ops use, those ops."""
    users: dict[str, list[str]] = {}
    parameters = dict(capture.model.named_parameters())
    for op in ops.values():
        for name in op.parameters:
            if name in parameters:
                users.setdefault(name, []).append(op.name)
    return {name: tuple(names) for name, names in users.items() if len(names) > 1}


def op_graph(
    capture: Capture,
    facts: Mapping[str, OpFacts],
    costs: Mapping[str, Mapping[str, OpCost]],
    cluster: Cluster,
    travels: Mapping[str, bool],
) -> nx.DiGraph:
    """Build the graph that the cut is searched on.

    Nodes carry ``op`` (:class:`OpNode`), ``compute_s`` per device kind (forward and backward of one microbatch; of
    that ``forward_s``), ``memory_bytes`` (parameters with gradients and optimizer state), ``gradient_bytes``,
    ``stash_bytes`` (saved for one microbatch) and ``workspace_bytes``. The graph carries ``transfers`` (seconds of a
    value, activation and gradient, for everyone it joins, and its bytes), ``together``, ``shared`` and ``ties``.
    ``costs`` has the ops' costs by the name of the device kind.
    """
    ops = op_nodes(capture, facts)
    sizes = state_bytes(capture)
    trainable = _trainable(capture)
    graph = nx.DiGraph()
    shared = _shared(ops, facts, sizes, trainable)
    common = {name for entry in shared for name in entry.names}
    for op in ops.values():
        own = [name for name in op.parameters if name not in common]
        priced = {kind: by_name.get(op.name, FREE) for kind, by_name in costs.items()}
        graph.add_node(
            op.name,
            op=op,
            compute_s={kind: cost.forward_s + cost.backward_s for kind, cost in priced.items()},
            forward_s={kind: cost.forward_s for kind, cost in priced.items()},
            memory_bytes=sum(sizes[name] * (STATE_COPIES if name in trainable else 1) for name in own),
            gradient_bytes=sum(sizes[name] for name in own if name in trainable),
            stash_bytes=sum(n_bytes for storage, n_bytes in facts[op.name].saves.items() if storage not in common),
            workspace_bytes=max(cost.workspace_bytes for cost in priced.values()),
        )
    for op in ops.values():
        graph.add_edges_from((name, op.name) for name in op.inputs if name in ops)
    graph.add_edges_from(_in_evaluation(capture, ops))
    graph.graph["transfers"] = _transfers(graph, ops, facts, cluster)
    graph.graph["together"] = forced_together(capture, facts, ops, travels)
    graph.graph["ties"] = ties(capture, ops)
    graph.graph["shared"] = [entry.record for entry in shared]
    return graph


@dataclass(frozen=True)
class _Shared:
    """What several ops have in common: parameters (by name) or saved storages, and the record of it for the cut."""

    names: tuple[str | int, ...]
    record: dict[str, object]


def _shared(
    ops: Mapping[str, OpNode], facts: Mapping[str, OpFacts], sizes: Mapping[str, int], trainable: Collection[str]
) -> list[_Shared]:
    """List what each stage holds once, however many of its ops use it: tied parameters, storages that several save."""
    users: dict[str | int, list[str]] = {}  # by the name of a parameter, or by storage
    n_bytes: dict[str | int, int] = {}
    for op in ops.values():
        for name in op.parameters:
            users.setdefault(name, []).append(op.name)
        for storage, size in facts[op.name].saves.items():
            users.setdefault(storage, []).append(op.name)
            n_bytes[storage] = size
    by_ops: dict[tuple[str, ...], list[str | int]] = {}
    for key, names in users.items():
        if len(names) > 1:
            by_ops.setdefault(tuple(names), []).append(key)
    found = []
    for nodes, common in by_ops.items():
        parameters = [name for name in common if isinstance(name, str)]
        record: dict[str, object] = {
            "nodes": list(nodes),
            "memory_bytes": sum(sizes[name] * (STATE_COPIES if name in trainable else 1) for name in parameters),
            "gradient_bytes": sum(sizes[name] for name in parameters if name in trainable),
            "stash_bytes": sum(n_bytes[name] for name in common if not isinstance(name, str)),
        }
        found.append(_Shared(tuple(common), record))
    return found


def _in_evaluation(capture: Capture, ops: Mapping[str, OpNode]) -> list[tuple[str, str]]:
    """List what must come before what for the sake of ops that only evaluation runs, which have no place yet."""
    if not has_modes(capture.union.graph):
        return []
    edges: list[tuple[str, str]] = []
    origins: dict[str, set[str]] = {}
    for node in capture.union.graph.nodes:
        before = {name for used in node.all_input_nodes for name in origins[used.name]}
        if node.name in ops:
            edges += [(name, node.name) for name in before if name != node.name]
            before = {node.name}
        origins[node.name] = before
    return edges


def _transfers(
    graph: nx.DiGraph, ops: Mapping[str, OpNode], facts: Mapping[str, OpFacts], cluster: Cluster
) -> list[dict[str, object]]:
    """Price every value by its bytes alone; the latency belongs to packets, which the simulator counts."""
    bytes_per_s = cluster.slowest_link(range(cluster.n_devices)).bytes_per_s
    transfers: list[dict[str, object]] = []
    users_of: dict[str, list[str]] = {}
    for op in ops.values():
        for used in dict.fromkeys(op.inputs):
            users_of.setdefault(used, []).append(op.name)
    for name, op in ops.items():
        users = users_of.get(name, [])
        if users:
            n_bytes = op.output_bytes * (2 if carries_gradient(facts[name]) else 1)
            seconds = n_bytes / bytes_per_s
            transfers.append({"nodes": [name, *users], "seconds": seconds, "bytes": op.output_bytes})
    return transfers


def carries_gradient(facts: OpFacts) -> bool:
    """Say whether a value has tensors that a gradient could be sent back for."""
    return any(_is_continuous(tensor) for tensor in tensors_in(facts.value))


def _is_continuous(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
