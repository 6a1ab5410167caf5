"""The planner: tries microbatch counts and schedules, cuts for each, and ranks by the simulator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx
import torch

from ..errors import ConstraintError, InfeasibleError
from ..runtime.instructions import Layout
from ..runtime.schedules import TRAINING_SCHEDULES
from ..runtime.schedules.one_f_one_b import warm_up
from ..structure import is_encodable
from .analysis import OpFacts, analyse
from .captured import Capture
from .cluster import Cluster
from .costs.analytic import analytic_costs
from .costs.measured import measured_costs
from .costs.op_cost import OpCost
from .cut import Cut, CutDevice, solve
from .opgraph import STATE_COPIES, OpNode, carries_gradient, op_graph, state_bytes
from .plan import FORMAT, Alternative, OpRecord, Plan, Prediction, StageRecord, WireRecord
from .predict import predict
from .split import fingerprint, wires_of

_COUNTS_PER_STAGE = (1, 2, 4)


@dataclass(frozen=True)
class Wishes:
    """What the user fixed; None leaves the choice to the planner.

    ``assignment`` maps every op to a stage and replaces the search for a cut.
    """

    n_microbatches: int | None = None
    schedule: str | None = None
    costs: str = "measured"
    assignment: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Priced:
    """A captured graph with facts and costs at one microbatch size.

    ``costs`` are those of the first device's kind, ``other_costs`` those of the cluster's other kinds by their names.
    """

    rows: int
    facts: dict[str, OpFacts]
    costs: dict[str, OpCost]
    graph: nx.DiGraph
    other_costs: dict[str, dict[str, OpCost]] = field(default_factory=dict)

    @property
    def ops(self) -> dict[str, OpNode]:
        """Return the ops by name, in graph order."""
        return {name: self.graph.nodes[name]["op"] for name in self.graph.nodes}


Progress = Callable[[str, int, int], None]


def make_plan(
    capture: Capture,
    tensors: Sequence[torch.Tensor],
    cluster: Cluster,
    wishes: Wishes,
    *,
    n_threads: int = 1,
    progress: Progress = lambda what, done, total: None,
) -> Plan:
    """Choose stages, microbatches and schedule for ``cluster``.

    ``tensors`` are the tensor leaves of an example call; the rows of the batched ones are the batch that the plan is
    for. Deterministic for equal costs. A microbatch count of the planner's own that the model refuses (BatchNorm wants
    more than one row) is left out.

    Raises:
        InfeasibleError: no cut fits the devices' memory, or there are fewer ops than stages.
        ConstraintError: the wishes contradict each other.
    """
    batched = [leaf.batched for leaf in capture.inputs.leaves if leaf.graph_input is not None]
    batch_rows = next(tensor.shape[0] for tensor, cut in zip(tensors, batched) if cut)
    candidates: list[Plan] = []
    failures: list[Exception] = []
    priced: dict[int, Priced] = {}
    for count in _counts(capture, wishes, cluster, batch_rows):
        rows = -(-batch_rows // min(batch_rows, count * max(len(stage) for stage in cluster.stages)))
        if rows not in priced:
            try:
                priced[rows] = price(capture, list(tensors), rows, cluster, wishes.costs, n_threads, progress)
            except Exception as error:
                if wishes.n_microbatches is not None:
                    raise
                failures.append(error)
                continue
        for name in (wishes.schedule,) if wishes.schedule else TRAINING_SCHEDULES:
            try:
                candidates.append(_candidate(capture, priced[rows], cluster, wishes, name, count, batch_rows))
            except InfeasibleError as error:
                failures.append(error)
    if not candidates:
        raise failures[0]
    candidates.sort(key=lambda plan: (plan.prediction.step_s, plan.n_microbatches, plan.schedule))
    candidates = _with_one_device(candidates, capture, list(tensors), batch_rows, cluster, wishes, n_threads, progress)
    others = tuple(Alternative(p.schedule, p.n_microbatches, p.prediction.step_s) for p in candidates[1:])
    return replace(candidates[0], alternatives=others)


def _with_one_device(
    candidates: list[Plan],
    capture: Capture,
    tensors: list[torch.Tensor],
    batch_rows: int,
    cluster: Cluster,
    wishes: Wishes,
    n_threads: int,
    progress: Progress,
) -> list[Plan]:
    """Let every candidate know what one worker takes for the batch, in its microbatches or whole, if that is faster."""
    alone = price(capture, tensors, batch_rows, cluster, wishes.costs, n_threads, progress)
    whole_s = sum(cost.forward_s + cost.backward_s for cost in alone.costs.values())
    return [
        replace(plan, prediction=replace(plan.prediction, one_device_s=min(plan.prediction.one_device_s, whole_s)))
        for plan in candidates
    ]


def _counts(capture: Capture, wishes: Wishes, cluster: Cluster, batch_rows: int) -> list[int]:
    if wishes.n_microbatches is not None:
        if wishes.n_microbatches < 1:
            raise ConstraintError(f"microbatches must be at least 1, got {wishes.n_microbatches}")
        return [wishes.n_microbatches]
    if capture.inputs.rows is not None:
        return [1]
    most = max(1, batch_rows // max(len(stage) for stage in cluster.stages))
    return sorted({min(most, cluster.n_stages * factor) for factor in _COUNTS_PER_STAGE})


def price(
    capture: Capture,
    tensors: list[torch.Tensor],
    rows: int,
    cluster: Cluster,
    source: str,
    n_threads: int = 1,
    progress: Progress = lambda what, done, total: None,
) -> Priced:
    """Analyse and price the graph at ``rows`` samples a microbatch.

    Raises:
        ConstraintError: ``source`` is not ``"measured"`` or ``"analytic"``.
    """
    if source not in ("measured", "analytic"):
        raise ConstraintError(f"costs must be 'measured' or 'analytic', got {source!r}")
    facts = analyse(capture, tensors, rows)
    on_meta = any(parameter.is_meta for parameter in capture.model.parameters())

    def tell(done: int, total: int) -> None:
        progress(f"measuring ops at {rows} rows", done, total)

    costs: dict[str, dict[str, OpCost]] = {}
    for kind in cluster.kinds:
        if source == "measured" and not cluster.simulated and kind.name == "cpu" and not on_meta:
            costs[kind.name] = measured_costs(capture.graph_module, facts, kind, n_threads, progress=tell)
            continue
        if source == "measured" and not cluster.simulated:
            why = "parameters are on the meta device" if on_meta else "ops are measured on CPU only in this version"
            warnings.warn(f"stagecut: {why}; costs are the roofline of {kind.name}", stacklevel=2)
        costs[kind.name] = analytic_costs(capture.graph_module, facts, kind)
    travels = {name: is_encodable(own.value) for name, own in facts.items()}
    first = costs.pop(cluster.devices[0].kind.name)
    return Priced(rows, facts, first, op_graph(capture, facts, first, cluster, travels, costs), costs)


def _candidate(
    capture: Capture, priced: Priced, cluster: Cluster, wishes: Wishes, name: str, count: int, batch_rows: int
) -> Plan:
    n_replicas = max(len(stage) for stage in cluster.stages)
    n_pieces = min(batch_rows, count * n_replicas)
    in_flight = _in_flight(cluster, name, n_pieces)
    if wishes.assignment is not None:
        stage_of = dict(wishes.assignment)
        cut = None
    else:
        kind = cluster.devices[0].kind
        devices = [CutDevice(f"stage {s}", kind.name, kind.memory_bytes) for s in range(cluster.n_stages)]
        cut = solve(priced.graph, devices, ordered=True, in_flight=in_flight)
        stage_of = {str(op): stage for op, stage in cut.stage_of.items()}
    return assemble(capture, priced, cluster, stage_of, cut, name, count, batch_rows, in_flight)


def _in_flight(cluster: Cluster, name: str, n_pieces: int) -> list[int]:
    layout = _chain(cluster)
    mine = [len(layout.microbatches_of(s, 0, n_pieces)) for s in range(layout.n_stages)]
    if name == "fill-drain":
        return mine
    return [min(warm_up(layout, s), mine[s]) for s in range(layout.n_stages)]


def _chain(cluster: Cluster) -> Layout:
    workers, first = [], 0
    for stage in cluster.stages:
        workers.append(tuple(range(first, first + len(stage))))
        first += len(stage)
    return Layout(tuple(workers), (), ())


def assemble(
    capture: Capture,
    priced: Priced,
    cluster: Cluster,
    stage_of: Mapping[str, int],
    cut: Cut | None,
    name: str,
    count: int,
    batch_rows: int,
    in_flight: Sequence[int],
) -> Plan:
    """Write down a decision as a plan, with what the simulator predicts for it."""
    ops = priced.ops
    wires = _wires(capture, priced, stage_of, cluster.n_stages)
    stages = tuple(_stage(capture, ops, stage_of, s, cluster, in_flight[s]) for s in range(cluster.n_stages))
    blank = Prediction(0.0, 0.0, 0.0, 0.0, False, 0.0, "")
    plan = Plan(
        format=FORMAT,
        model=type(capture.model).__name__,
        fingerprint=fingerprint(capture),
        batch_rows=batch_rows,
        n_microbatches=count,
        schedule=name,
        graph_inputs=tuple(leaf.graph_input for leaf in capture.inputs.leaves if leaf.graph_input is not None),
        ops=tuple(_op(op, stage_of[op.name]) for op in ops.values()),
        stages=stages,
        wires=wires,
        prediction=blank,
        alternatives=(),
    )
    timeline = predict(plan, cluster)
    n_pieces = min(batch_rows, count * plan.layout().n_replicas)
    work = sum(op.cost.forward_s + op.cost.backward_s for op in ops.values())
    loads = _loads(priced, stage_of, cluster.n_stages)
    return replace(
        plan,
        prediction=Prediction(
            step_s=timeline.makespan_s,
            bubble=timeline.bubble,
            bottleneck_s=max(loads),
            lower_bound_s=cut.lower_bound if cut is not None else work / cluster.n_stages,
            optimal=cut.optimal if cut is not None else False,
            one_device_s=n_pieces * work,
            cost_source=_source(priced.costs),
        ),
    )


def _source(costs: Mapping[str, OpCost]) -> str:
    sources = {cost.source for cost in costs.values()} - {"none"}
    if sources <= {"measured", "cached"} and sources:
        return "measured"
    return "analytic" if sources <= {"analytic"} else "measured and analytic"


def _loads(priced: Priced, stage_of: Mapping[str, int], n_stages: int) -> list[float]:
    """Return each stage's compute and transfers for one microbatch, as the cut counts them."""
    loads = [0.0] * n_stages
    for name, op in priced.ops.items():
        loads[stage_of[name]] += op.cost.forward_s + op.cost.backward_s
    for transfer in priced.graph.graph["transfers"]:
        touched = {stage_of[name] for name in transfer["nodes"]}
        if len(touched) > 1:
            for s in touched:
                loads[s] += transfer["seconds"]
    return loads


def _op(op: OpNode, stage: int) -> OpRecord:
    return OpRecord(
        name=op.name,
        target=op.target,
        module_path=op.module_path,
        source=op.source,
        stage=stage,
        inputs=op.inputs,
        forward_s=op.cost.forward_s,
        backward_s=op.cost.backward_s,
        output_bytes=op.output_bytes,
        saved_bytes=op.saved_bytes,
        cost_source=op.cost.source,
    )


def _stage(
    capture: Capture, ops: Mapping[str, OpNode], stage_of: Mapping[str, int], s: int, cluster: Cluster, in_flight: int
) -> StageRecord:
    mine = [op for op in ops.values() if stage_of[op.name] == s]
    sizes = state_bytes(capture)
    names = dict.fromkeys(name for op in mine for name in op.parameters)
    trainable = {name for name, parameter in capture.model.named_parameters() if parameter.requires_grad}
    state = sum(sizes[name] * (STATE_COPIES if name in trainable else 1) for name in names)
    saved = sum(op.saved_bytes for op in mine)
    return StageRecord(
        index=s,
        devices=cluster.stages[s],
        forward_s=sum(op.cost.forward_s for op in mine),
        backward_s=sum(op.cost.backward_s for op in mine),
        parameter_bytes=sum(sizes[name] for name in names),
        saved_bytes=saved,
        in_flight=in_flight,
        memory_bytes=state + in_flight * saved,
        memory_limit_bytes=float(min(cluster.devices[0].kind.memory_bytes, 2.0**62)),
    )


def _wires(capture: Capture, priced: Priced, stage_of: Mapping[str, int], n_stages: int) -> tuple[WireRecord, ...]:
    targets: dict[str, list[int]] = {}
    for (_, target), names in sorted(_training_wires(capture, stage_of, n_stages).items()):
        for name in names:
            targets.setdefault(name, []).append(target)
    order = list(priced.ops)
    return tuple(
        WireRecord(
            name,
            stage_of[name],
            tuple(targets[name]),
            priced.ops[name].output_bytes,
            carries_gradient(priced.facts[name]),
        )
        for name in sorted(targets, key=order.index)
    )


def _training_wires(
    capture: Capture, stage_of: Mapping[str, int], n_stages: int
) -> dict[tuple[int, int], tuple[str, ...]]:
    reported = [leaf.node for leaf in capture.outputs if leaf.node is not None]
    return wires_of(capture.graph_module, stage_of, n_stages, reported)


def random_ops(facts: Mapping[str, OpFacts]) -> dict[str, bool]:
    """Name the ops that draw random numbers."""
    return {name: own.random for name, own in facts.items()}
