"""A decision written down as a plan, with what the simulator predicts for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..runtime.instructions import Layout
from ..runtime.schedules import Orders
from ..runtime.schedules.tokens import token
from .captured import Capture
from .cluster import Cluster
from .copies import choose_copies
from .costs.op_cost import FREE, OpCost
from .cut import Cut
from .memory import StageMemory, stage_memory
from .opgraph import OpNode, carries_gradient, state_bytes
from .plan import FORMAT, OpRecord, Plan, Prediction, StageRecord, TieRecord, WireRecord
from .predict import predict_column
from .pricing import Priced
from .residency import beside_bytes, in_flight_of
from .split import fingerprint, wires_of
from .timing import pack_bytes_per_s, timing_of


@dataclass(frozen=True)
class Decision:
    """Who computes what: all that a plan decides.

    Attributes:
        cluster: the devices, grouped into stages.
        stage_of: the stage of each op.
        recompute: per stage, whether its backward computes its activations again.
        schedule: the order of compute.
        n_microbatches: pieces that each replica of the widest stage cuts its share into.
        cut: the search that found it, if one did.
        orders: the order of compute of each worker of one replica, where ``schedule`` does not say it.
    """

    cluster: Cluster
    stage_of: Mapping[str, int]
    recompute: tuple[bool, ...]
    schedule: str
    n_microbatches: int
    cut: Cut | None = None
    orders: Orders = ()

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Return the devices of each stage, by index."""
        assert self.cluster.groups is not None
        return self.cluster.groups

    def layout(self) -> Layout:
        """Return who owns which stage; wires are not known yet."""
        return Layout(self.groups, (), ())


def n_pieces_of(groups: Sequence[Sequence[int]], n_microbatches: int, batch_rows: int) -> int:
    """Count the microbatches of the whole batch."""
    return min(batch_rows, n_microbatches * max(len(group) for group in groups))


def assemble(capture: Capture, priced: Priced, decision: Decision, batch_rows: int) -> Plan:
    """Write a decision down as a plan, and predict its step."""
    return _Assembly(capture, priced, decision, batch_rows).plan()


def stage_records(capture: Capture, priced: Priced, decision: Decision, batch_rows: int) -> tuple[StageRecord, ...]:
    """Return the stages of the plan that :func:`assemble` makes, without simulating its step."""
    return _Assembly(capture, priced, decision, batch_rows).stages()


class _Assembly:
    def __init__(self, capture: Capture, priced: Priced, decision: Decision, batch_rows: int) -> None:
        self.capture, self.priced, self.decision, self.batch_rows = capture, priced, decision, batch_rows
        self.ops = priced.ops
        self.cluster, self.stage_of = decision.cluster, decision.stage_of
        self.n_stages = len(decision.groups)
        self.costs = [priced.costs[self._kind_of(s)] for s in range(self.n_stages)]
        self.n_pieces = n_pieces_of(decision.groups, decision.n_microbatches, batch_rows)
        self.sizes = state_bytes(capture)
        self.trainable = {name for name, p in capture.model.named_parameters() if p.requires_grad}
        self.workspace = [{name: cost.workspace_bytes for name, cost in costs.items()} for costs in self.costs]
        self.loss_s = priced.loss_s.get(self._kind_of(self.n_stages - 1), (0.0, 0.0))
        self.wire_bytes_per_s = self._wire_bytes_per_s()
        self.layout = decision.layout()
        self.in_flight = in_flight_of(self.layout, decision.schedule, self.n_pieces, decision.orders)
        sent = self._sent(self._crossing({}))
        self.copies = choose_copies(
            self.ops, self.stage_of, sent, priced.graph.graph["copyable"], self._wire_s, self._compute_s
        )
        self.crossing = self._crossing(self.copies)

    def _kind_of(self, s: int) -> str:
        """Name the slowest kind of device of a stage."""
        kinds = {self.cluster.devices[index].kind.name for index in self.decision.groups[s]}
        return max(sorted(kinds), key=self.priced.work_s)

    def _compute_s(self, name: str, s: int) -> float:
        cost = self.costs[s].get(name, FREE)
        return cost.forward_s + cost.backward_s

    def _wire_bytes_per_s(self) -> float:
        bytes_per_s = self.cluster.slowest_link(range(self.cluster.n_devices)).bytes_per_s
        if all(device.kind.name == "cpu" for device in self.cluster.devices):
            bytes_per_s = 1 / (1 / bytes_per_s + 1 / pack_bytes_per_s(self.cluster))
        return bytes_per_s

    def _wire_s(self, name: str) -> float:
        back = carries_gradient(self.priced.facts[name])
        return self.ops[name].output_bytes * (2 if back else 1) / self.wire_bytes_per_s

    def _crossing(self, copies: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Return, per value that crosses, the stages that it goes to."""
        reported = [leaf.node for leaf in self.capture.outputs if leaf.node is not None]
        pairs = wires_of(self.capture.graph_module, self.stage_of, self.n_stages, reported, copies)
        targets: dict[str, list[int]] = {}
        for (_, target), names in sorted(pairs.items()):
            for name in names:
                targets.setdefault(name, []).append(target)
        return {name: tuple(targets[name]) for name in self.ops if name in targets}

    def _sent(self, crossing: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Leave out what goes from one stage of a worker to another."""
        owners = self.layout.workers
        sent = {name: tuple(s for s in to if owners[s] != owners[self.stage_of[name]]) for name, to in crossing.items()}
        return {name: to for name, to in sent.items() if to}

    def stages(self) -> tuple[StageRecord, ...]:
        alone = [self._stage(s) for s in range(self.n_stages)]
        how = self.decision
        more = beside_bytes(alone, self.layout, how.schedule, self.n_pieces, how.orders)
        return tuple(replace(stage, beside_bytes=n_bytes) for stage, n_bytes in zip(alone, more))

    def plan(self) -> Plan:
        stages = self.stages()
        wires = tuple(
            WireRecord(
                name, self.stage_of[name], to, self.ops[name].output_bytes, carries_gradient(self.priced.facts[name])
            )
            for name, to in self.crossing.items()
        )
        plan = Plan(
            format=FORMAT,
            model=type(self.capture.model).__name__,
            fingerprint=fingerprint(self.capture),
            batch_rows=self.batch_rows,
            n_microbatches=self.decision.n_microbatches,
            schedule=self.decision.schedule,
            graph_inputs=tuple(leaf.graph_input for leaf in self.capture.inputs.leaves if leaf.graph_input is not None),
            ops=tuple(self._op(op) for op in self.ops.values()),
            stages=stages,
            wires=wires,
            prediction=Prediction(0.0, 0.0, 0.0, 0.0, False, 0.0, ""),
            alternatives=(),
            n_threads=self.priced.n_threads,
            timing=timing_of(self.cluster, stages, wires, self.loss_s, self.priced.optimizer),
            orders=tuple(tuple(map(token, order)) for order in self.decision.orders),
            ties=self._ties(),
        )
        return replace(plan, prediction=self._prediction(plan))

    def _ties(self) -> tuple[TieRecord, ...]:
        ties: Mapping[str, tuple[str, ...]] = self.priced.graph.graph["ties"]
        return tuple(
            TieRecord(parameter, names, self.sizes[parameter])
            for parameter, names in ties.items()
            if len({self.stage_of[name] for name in names}) > 1
        )

    def _prediction(self, plan: Plan) -> Prediction:
        timeline = predict_column(plan)
        cut = self.decision.cut
        once_s = sum(op.forward_s + op.backward_s for op in plan.ops)  # without copies, and computed once
        loads = self._loads_s()
        return Prediction(
            step_s=timeline.makespan_s,
            bubble=timeline.bubble,
            bottleneck_s=max(loads) if cut is None else cut.max_load,
            lower_bound_s=self._least_load_s() if cut is None else cut.lower_bound,
            optimal=self.n_stages == 1 if cut is None else cut.optimal,
            one_device_s=self.n_pieces * (once_s + sum(self.loss_s)),
            cost_source=_source(self.costs),
        )

    def _least_load_s(self) -> float:
        """Return what every device computes if all compute equally long, each op where it is fastest."""
        by_op = (min(self._compute_s(name, s) for s in range(self.n_stages)) for name in self.ops)
        return sum(by_op) / self.cluster.n_devices

    def _loads_s(self) -> list[float]:
        """Return each stage's compute and transfers for one microbatch, shared by its replicas."""
        loads = [0.0] * self.n_stages
        for name, s in ((name, self.stage_of[name]) for name in self.ops):
            loads[s] += self._compute_s(name, s)
            loads[s] += self.costs[s].get(name, FREE).forward_s if self.decision.recompute[s] else 0.0
        for transfer in self.priced.graph.graph["transfers"]:
            touched = {self.stage_of[name] for name in transfer["nodes"]}
            for s in touched if len({self.layout.workers[s] for s in touched}) > 1 else ():
                loads[s] += transfer["seconds"]
        loads[-1] += sum(self.loss_s)
        return [load / len(group) for load, group in zip(loads, self.decision.groups)]

    def _op(self, op: OpNode) -> OpRecord:
        cost = self.costs[self.stage_of[op.name]].get(op.name, FREE)
        return OpRecord(
            name=op.name,
            target=op.target,
            module_path=op.module_path,
            source=op.source,
            stage=self.stage_of[op.name],
            inputs=op.inputs,
            forward_s=cost.forward_s,
            backward_s=cost.backward_s,
            output_bytes=op.output_bytes,
            saved_bytes=op.saved_bytes,
            cost_source=cost.source,
            backward_weight_s=cost.backward_weight_s,
            workspace_bytes=cost.workspace_bytes,
            copies=self.copies.get(op.name, ()),
        )

    def _stage(self, s: int) -> StageRecord:
        mine = [name for name in self.ops if self.stage_of[name] == s or s in self.copies.get(name, ())]
        costs = [self.costs[s].get(name, FREE) for name in mine]
        memory = self._memory(s, mine)
        in_flight = self.in_flight[s]
        again = self.decision.recompute[s]
        forward_s = sum(cost.forward_s for cost in costs)
        loss_s = self.loss_s if s == self.n_stages - 1 else (0.0, 0.0)  # not computed again
        limits = [self.cluster.devices[index].kind.memory_bytes for index in self.decision.groups[s]]
        return StageRecord(
            index=s,
            devices=self.cluster.stages[s],
            workers=self.decision.groups[s],
            forward_s=forward_s + loss_s[0],
            backward_s=sum(cost.backward_s for cost in costs) + (forward_s if again else 0.0) + loss_s[1],
            parameter_bytes=memory.parameter_bytes,
            saved_bytes=memory.saved_bytes,
            in_flight=in_flight,
            memory_bytes=memory.peak_bytes(in_flight, again),
            memory_limit_bytes=float(min(*limits, 2.0**62)),
            input_bytes=memory.input_bytes,
            workspace_bytes=memory.workspace_bytes,
            recompute=again,
            backward_weight_s=0.0 if again or not self._splits(mine) else sum(cost.backward_weight_s for cost in costs),
        )

    def _splits(self, mine: Sequence[str]) -> bool:
        """Say whether all ops of a stage can be recorded, so that its input and weight gradients run apart."""
        return self.capture.kept_whole.isdisjoint(mine)

    def _memory(self, s: int, mine: Sequence[str]) -> StageMemory:
        reported = [leaf.node for leaf in self.capture.outputs if leaf.node is not None]
        on_last = s == self.n_stages - 1
        earlier = [t for t in range(s) if self.layout.workers[t] == self.layout.workers[s]]
        known = {name for op in self.ops.values() if self.stage_of[op.name] in earlier for name in op.parameters}
        return stage_memory(
            mine,
            self.ops,
            self.priced.facts,
            wires_in=[name for name, targets in self.crossing.items() if s in targets],
            wires_out=[name for name in self.crossing if self.stage_of[name] == s],
            sizes={**self.sizes, **dict.fromkeys(known, 0)},
            trainable=self.trainable,
            workspace_bytes=self.workspace[s],
            reported=[name for name in reported if self.stage_of.get(name) == s] if on_last else (),
        )


def _source(priced: Sequence[Mapping[str, OpCost]]) -> str:
    sources = {cost.source for costs in priced for cost in costs.values()} - {"none"}
    if sources <= {"measured", "cached"} and sources:
        return "measured"
    return "analytic" if sources <= {"analytic"} else "measured and analytic"
