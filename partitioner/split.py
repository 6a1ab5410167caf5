"""The split: a captured graph and a plan become stages that a worker can run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import fx

from ..errors import PlanError
from ..runtime.program import NodeRecord, NodeRef, PipelineSpec, StageSpec, WireGroup
from ..structure import flatten
from .capture import Capture
from .opgraph import is_replicable
from .plan import Plan


def fingerprint(capture: Capture) -> str:
    """Hash the graph: ops, wiring, parameter names and shapes; equal for equal models."""
    lines = []
    for node in capture.graph.nodes:
        leaves, structure = flatten((list(node.args), dict(node.kwargs)))
        arguments = [leaf.name if isinstance(leaf, fx.Node) else _stable(leaf) for leaf in leaves]
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__qualname__", str(node.target))
        lines.append(f"{node.op} {node.name} {target} {arguments} {structure.n_leaves}")
    lines += [
        f"{name} {tuple(p.shape)} {p.dtype}" for name, p in capture.model.named_parameters(remove_duplicate=False)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _stable(leaf: Any) -> str:
    return repr(leaf) if isinstance(leaf, (int, float, str, bool, type(None))) else type(leaf).__name__


def split(capture: Capture, plan: Plan, random_ops: Mapping[str, bool]) -> PipelineSpec:
    """Cut the captured graph as the plan says.

    ``random_ops`` names the ops that draw random numbers.

    Raises:
        PlanError: the plan was made for another graph.
    """
    own = fingerprint(capture)
    if plan.fingerprint != own:
        raise PlanError(
            f"the plan was made for {plan.model} with graph {plan.fingerprint}; "
            f"{type(capture.model).__name__}'s graph is {own}",
            hint="make a plan for this model: stagecut.plan(model, devices, example_inputs=...)",
        )
    stages = _cut(capture, plan.stage_of, len(plan.stages), random_ops)
    (whole,) = _cut(capture, dict.fromkeys(plan.stage_of, 0), 1, random_ops)
    return PipelineSpec(
        stages=stages,
        layout=plan.layout(),
        devices=plan.devices,
        schedule=plan.schedule,
        microbatches_per_replica=plan.n_microbatches,
        whole=whole,
        inputs=capture.inputs,
        random=any(random_ops.values()),
        fingerprint=f"{own}/{plan.stage_of}/{plan.devices}/{plan.schedule}/{plan.n_microbatches}",
    )


def _cut(
    capture: Capture, stage_of: Mapping[str, int], n_stages: int, random_ops: Mapping[str, bool]
) -> tuple[StageSpec, ...]:
    crossing = wires_of(capture, stage_of, n_stages)
    return tuple(_stage(capture, stage_of, s, n_stages, crossing, random_ops) for s in range(n_stages))


def wires_of(capture: Capture, stage_of: Mapping[str, int], n_stages: int) -> dict[tuple[int, int], tuple[str, ...]]:
    """Return, per pair of stages, the values that go from the first to the second, in graph order."""
    wanted: dict[tuple[int, int], dict[str, None]] = {}

    def need(name: str, stage: int) -> None:
        origin = stage_of.get(name)
        if origin is not None and origin != stage:
            wanted.setdefault((origin, stage), {})[name] = None

    for node in capture.graph.nodes:
        if node.name in stage_of:
            for i in node.all_input_nodes:
                need(i.name, stage_of[node.name])
    for leaf in capture.outputs:
        if leaf.node is not None:
            need(leaf.node, n_stages - 1)
    order = {node.name: index for index, node in enumerate(capture.graph.nodes)}
    return {pair: tuple(sorted(names, key=order.__getitem__)) for pair, names in wanted.items()}


def _stage(
    capture: Capture,
    stage_of: Mapping[str, int],
    s: int,
    n_stages: int,
    crossing: Mapping[tuple[int, int], tuple[str, ...]],
    random_ops: Mapping[str, bool],
) -> StageSpec:
    module = capture.graph_module
    last = s == n_stages - 1
    own = {name for name, stage in stage_of.items() if stage == s}
    reported = {leaf.node for leaf in capture.outputs if leaf.node is not None} if last else set()
    used = {i.name for node in capture.graph.nodes if node.name in own for i in node.all_input_nodes} | reported
    records, modules, attributes, owners = [], {}, {}, {}
    for node in capture.graph.nodes:
        if node.name not in own and not (node.name in used and is_replicable(node, module)):
            continue
        records.append(_record(node, random_ops.get(node.name, False)))
        target = str(node.target)
        if node.op == "call_module":
            modules[target] = module.get_submodule(target)
            owners[target] = capture.mode_owners[target]
        elif node.op == "get_attr":
            attributes[target] = _attribute(module, target)
    inputs = {leaf.graph_input for leaf in capture.inputs.leaves if leaf.graph_input is not None}
    return StageSpec(
        index=s,
        nodes=tuple(records),
        modules=modules,
        attributes=attributes,
        graph_inputs=tuple(n.name for n in capture.graph.nodes if n.op == "placeholder" and n.name in used & inputs),
        wires_in=tuple(WireGroup(a, names) for (a, b), names in sorted(crossing.items()) if b == s),
        wires_out=tuple(WireGroup(b, names) for (a, b), names in sorted(crossing.items()) if a == s),
        outputs=capture.outputs if last else (),
        output_structure=capture.output_structure if last else None,
        mode_owners=owners,
    )


def _attribute(module: fx.GraphModule, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _record(node: fx.Node, random: bool) -> NodeRecord:
    def refer_leaf(leaf: Any) -> Any:
        return NodeRef(leaf.name) if isinstance(leaf, fx.Node) else leaf

    def refer(value: Any) -> Any:
        return fx.node.map_aggregate(value, refer_leaf)

    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return NodeRecord(node.name, node.op, node.target, tuple(refer(node.args)), dict(refer(node.kwargs)), path, random)
