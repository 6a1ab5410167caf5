"""The split: a captured graph and a plan become stages that a worker can run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from ..errors import PlanError
from ..runtime.program import NodeRecord, NodeRef, PipelineSpec, StageSpec, WireGroup
from ..runtime.schedules.tokens import actions_of
from .captured import Capture
from .opgraph import is_replicable, is_switch
from .plan import Plan
from .recording.emit import ONLY, OWNER


def fingerprint(capture: Capture) -> str:
    """Hash the graph: ops, wiring, parameter names and shapes; equal for equal models."""
    lines = []
    for node in capture.union.graph.nodes:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__qualname__", str(node.target))
        arguments = fx.node.map_aggregate((node.args, node.kwargs), _stable)
        lines.append(f"{node.op} {node.name} {target} {arguments} {node.meta.get(ONLY)}")
    lines += [
        f"{name} {tuple(p.shape)} {p.dtype}" for name, p in capture.model.named_parameters(remove_duplicate=False)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _stable(leaf: Any) -> str:
    if isinstance(leaf, fx.Node):
        return leaf.name
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
    stage_of = _with_evaluation(capture, plan.stage_of, len(plan.stages))
    copies = {op.name: op.copies for op in plan.ops if op.copies}
    stages = _cut(capture, stage_of, len(plan.stages), random_ops, copies)
    stages = tuple(replace(spec, recompute=stage.recompute) for spec, stage in zip(stages, plan.stages))
    (whole,) = _cut(capture, dict.fromkeys(stage_of, 0), 1, random_ops, {})
    return PipelineSpec(
        stages=stages,
        layout=plan.layout(),
        devices=plan.devices,
        schedule=plan.schedule,
        microbatches_per_replica=plan.n_microbatches,
        whole=whole,
        inputs=capture.inputs,
        random=any(random_ops.values()),
        fingerprint=f"{own}/{plan.stage_of}/{copies}/{[stage.recompute for stage in plan.stages]}/{plan.devices}/"
        f"{[stage.workers for stage in plan.stages]}/{plan.schedule}/{plan.orders}/{plan.n_microbatches}",
        n_threads=plan.n_threads,
        orders=actions_of(plan.orders),
        step_s=plan.prediction.step_s,
        worker_bytes=plan.worker_bytes,
    )


def _with_evaluation(capture: Capture, stage_of: Mapping[str, int], n_stages: int) -> dict[str, int]:
    """Give ops that only evaluation runs a stage: where their weights train if their neighbours allow it."""
    union = capture.union
    placed = dict(stage_of)
    latest: dict[str, int] = {}
    for node in reversed(union.graph.nodes):
        users = [n_stages - 1 if user.op == "output" else latest[user.name] for user in node.users]
        latest[node.name] = stage_of.get(node.name, min(users, default=n_stages - 1))
    homes = {node.target: stage_of[node.name] for node in union.graph.nodes
             if node.op == "call_module" and node.name in stage_of}  # fmt: skip
    for node in union.graph.nodes:
        if node.name in placed or node.op in ("placeholder", "output") or is_replicable(node, union):
            continue
        earliest = max((placed[name] for name in sources(node, union) if name in placed), default=0)
        placed[node.name] = max(earliest, min(homes.get(node.target, earliest), latest[node.name]))
    return placed


def _cut(
    capture: Capture,
    stage_of: Mapping[str, int],
    n_stages: int,
    random_ops: Mapping[str, bool],
    copies: Mapping[str, Sequence[int]],
) -> tuple[StageSpec, ...]:
    reported = [leaf.node for result in (capture.trained, capture.evaluated) for leaf in result.leaves]
    crossing = wires_of(capture.union, stage_of, n_stages, [name for name in reported if name is not None], copies)
    own: list[set[str]] = [set() for _ in range(n_stages)]
    for name, stage in stage_of.items():
        for s in (stage, *copies.get(name, ())):
            own[s].add(name)
    return tuple(_stage(capture, own[s], s, n_stages, crossing, random_ops) for s in range(n_stages))


def sources(node: fx.Node, module: fx.GraphModule) -> list[str]:
    """List the values that a node uses, with both sides of a switch instead of the switch."""
    found: dict[str, None] = {}
    for used in node.all_input_nodes:
        found.update(dict.fromkeys(sources(used, module) if is_switch(used, module) else [used.name]))
    return list(found)


def wires_of(
    module: fx.GraphModule,
    stage_of: Mapping[str, int],
    n_stages: int,
    reported: Sequence[str],
    copies: Mapping[str, Sequence[int]],
) -> dict[tuple[int, int], tuple[str, ...]]:
    """Return, per pair of stages, the values that go from the first to the second, in graph order.

    ``reported`` names the values of the model's result; ``copies`` the stages that compute an op again.
    """
    wanted: dict[tuple[int, int], dict[str, None]] = {}

    def need(name: str, stage: int) -> None:
        origin = stage_of.get(name)
        if origin is not None and origin != stage and stage not in copies.get(name, ()):
            wanted.setdefault((origin, stage), {})[name] = None

    nodes = {node.name: node for node in module.graph.nodes}
    for node in nodes.values():
        if node.name in stage_of:
            for name in sources(node, module):
                for stage in (stage_of[node.name], *copies.get(node.name, ())):
                    need(name, stage)
    for name in reported:
        for source in sources(nodes[name], module) if is_switch(nodes[name], module) else [name]:
            need(source, n_stages - 1)
    order = {name: index for index, name in enumerate(nodes)}
    return {pair: tuple(sorted(names, key=order.__getitem__)) for pair, names in wanted.items()}


def _stage(
    capture: Capture,
    own: set[str],
    s: int,
    n_stages: int,
    crossing: Mapping[tuple[int, int], tuple[str, ...]],
    random_ops: Mapping[str, bool],
) -> StageSpec:
    module = capture.union
    last = s == n_stages - 1
    used = _used(capture, own, last)
    records, modules, attributes, owners = [], {}, {}, {}
    for node in module.graph.nodes:
        if node.name not in own and not (node.name in used and is_replicable(node, module)):
            continue
        records.append(_record(node, random_ops.get(node.name, False), is_switch(node, module)))
        target = str(node.target)
        value = _attribute(module, target) if node.op in ("get_attr", "call_module") else None
        if records[-1].op == "switch":
            continue
        if isinstance(value, nn.Module):
            modules[target] = value
            owners[target] = capture.mode_owners[target]
        elif node.op == "get_attr":
            attributes[target] = value
    inputs = {leaf.graph_input for leaf in capture.inputs.leaves if leaf.graph_input is not None}
    other = None if capture.evaluated is capture.trained else (capture.evaluated.leaves, capture.evaluated.structure)
    return StageSpec(
        index=s,
        nodes=tuple(records),
        modules=modules,
        attributes=attributes,
        graph_inputs=tuple(n.name for n in module.graph.nodes if n.op == "placeholder" and n.name in used & inputs),
        wires_in=tuple(WireGroup(a, names) for (a, b), names in sorted(crossing.items()) if b == s),
        wires_out=tuple(WireGroup(b, names) for (a, b), names in sorted(crossing.items()) if a == s),
        outputs=capture.trained.leaves if last else (),
        output_structure=capture.trained.structure if last else None,
        evaluated=other if last else None,
        mode_owners=owners,
        captured_on=capture.device,
    )


def _used(capture: Capture, own: set[str], last: bool) -> set[str]:
    """Name what a stage needs: its ops' inputs, on the last one the result, and what switches choose from."""
    waiting = [node for node in capture.union.graph.nodes if node.name in own]
    used: set[str] = set()
    if last:
        results = {leaf.node for result in (capture.trained, capture.evaluated) for leaf in result.leaves}
        used |= {name for name in results if name is not None}
        waiting += [node for node in capture.union.graph.nodes if node.name in used and is_switch(node, capture.union)]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node.name not in used:
                used.add(node.name)
                waiting += [node] if is_replicable(node, capture.union) else []
    return used


def _attribute(module: fx.GraphModule, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _record(node: fx.Node, random: bool, switch: bool) -> NodeRecord:
    def refer_leaf(leaf: Any) -> Any:
        return NodeRef(leaf.name) if isinstance(leaf, fx.Node) else leaf

    def refer(value: Any) -> Any:
        return fx.node.map_aggregate(value, refer_leaf)

    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    op, target = ("switch", node.meta[OWNER]) if switch else (node.op, node.target)
    only = node.meta.get(ONLY)
    return NodeRecord(node.name, op, target, tuple(refer(node.args)), dict(refer(node.kwargs)), path, random, only)
