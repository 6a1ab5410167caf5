"""The plan: the whole decision as one frozen record, printable, and JSON both ways."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..records import from_json, json_schema, read_file, to_json
from ..representation import html_of
from ..runtime.instructions import Layout
from .plan_check import validate
from .wording import count, ms

if TYPE_CHECKING:
    from ..runtime.program import Timeline

FORMAT = 6
# What a local worker holds beside weights, gradients and a bare process, fitted to peaks of four models in five
# configurations each (docs/planner.md): its heap over what is in use of it at its fullest (there are holes between
# blocks of other sizes), the code that each op was recorded as, and what libraries of mathematics work in.
_HEAP = 1.12
_RECORDING_BYTES = 48 << 10
_SCRATCH_BYTES = 16 << 20


@dataclass(frozen=True)
class OpRecord:
    """One op: what it is, where it comes from, which stage runs it, what it costs for one microbatch.

    ``copies`` are later stages that compute it again, because that is cheaper than sending its value.
    ``backward_weight_s`` is the part of ``backward_s`` that makes gradients of parameters. ``workspace_bytes`` is what
    it needs while it runs, beside its inputs, its result and what it saves.
    """

    name: str
    target: str
    module_path: str
    source: str | None
    stage: int
    inputs: tuple[str, ...]
    forward_s: float
    backward_s: float
    output_bytes: int
    saved_bytes: int
    cost_source: str
    backward_weight_s: float = 0.0
    workspace_bytes: int = 0
    copies: tuple[int, ...] = ()


@dataclass(frozen=True)
class StageRecord:
    """One stage: the devices of its replicas, and what one microbatch costs there.

    ``workers`` are its replicas' workers, by number. Stages that share one share all of them.
    ``memory_bytes`` is the predicted peak of one replica: parameters with gradients and optimizer state, what is
    saved for the microbatches in flight, and the workspace of one op. With ``recompute`` only ``input_bytes`` are held
    for each microbatch in flight, ``backward_s`` contains a second forward, and one microbatch at a time is saved
    whole. ``beside_bytes`` is what a worker holds more when it is at its fullest, for its other stages; what a
    parameter takes is counted for the first stage of a worker that uses it.
    ``backward_weight_s`` is the part of ``backward_s`` that schedules with split backwards run apart; 0 where
    the stage runs its backward as a whole under them too.
    """

    index: int
    devices: tuple[str, ...]
    workers: tuple[int, ...]
    forward_s: float
    backward_s: float
    parameter_bytes: int
    saved_bytes: int
    in_flight: int
    memory_bytes: int
    memory_limit_bytes: float
    input_bytes: int = 0
    workspace_bytes: int = 0
    recompute: bool = False
    backward_weight_s: float = 0.0
    beside_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        """Return the most bytes on a device of this stage, for all stages that its worker owns."""
        return self.memory_bytes + self.beside_bytes

    @property
    def held_bytes(self) -> int:
        """Return the most bytes of activations at once, with the workspace of one op."""
        if self.recompute:
            return self.in_flight * self.input_bytes + self.saved_bytes + self.workspace_bytes
        return self.in_flight * self.saved_bytes + self.workspace_bytes


@dataclass(frozen=True)
class WireRecord:
    """One value that crosses from the stage that makes it to stages that use it, per microbatch."""

    value: str
    source: int
    targets: tuple[int, ...]
    n_bytes: int
    gradient: bool


@dataclass(frozen=True)
class TieRecord:
    """A parameter that ops of several stages use: its gradients are summed over them once a step."""

    parameter: str
    ops: tuple[str, ...]
    n_bytes: int


@dataclass(frozen=True)
class LinkRecord:
    """What a packet from one stage to another (and its gradient back) costs: latency, and bytes per second."""

    source: int
    target: int
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Timing:
    """What the simulator needs to know beside stages and wires.

    Attributes:
        links: per pair of stages that exchange packets.
        action_s: the runtime's own work per compute instruction.
        send_s, pack_bytes_per_s: what sending keeps the sender busy for; None packs at once.
        reduce_s, reduce_buckets: per stage, the seconds of the gradient reduction over its replicas, and the parts in
            which it goes beside the last backward; () for one, after it.
        store_s, accumulate_s: per stage, by how much a replica's first backward is longer, since gradients move to
            memory that they share, and by how much its later ones are, which add to them.
        optimizer_s: per stage, the optimizer's step on its weights; () where it is not part of the prediction.
        loss_s: of a microbatch's loss, forward and backward; both are part of the last stage's seconds.
        start_s: before the workers begin, and after they are done.
        split: how many times as long the two parts of a backward take as the whole.
        hosts: per worker, its machine (() for one each); n_cores: workers that a machine runs at full speed at once;
            beside: how many times as long work takes while others of the machine are busy too; sharing: the same,
            beyond its share of a core, while there are more of them than cores.
        source: where these numbers come from.
    """

    links: tuple[LinkRecord, ...] = ()
    action_s: float = 0.0
    send_s: float = 0.0
    pack_bytes_per_s: float | None = None
    reduce_s: tuple[float, ...] = ()
    reduce_buckets: tuple[int, ...] = ()
    store_s: tuple[float, ...] = ()
    accumulate_s: tuple[float, ...] = ()
    optimizer_s: tuple[float, ...] = ()
    loss_s: tuple[float, float] = (0.0, 0.0)
    start_s: float = 0.0
    split: float = 1.0
    hosts: tuple[int, ...] = ()
    n_cores: int | None = None
    beside: float = 1.0
    sharing: float = 1.0
    source: str = "none"


@dataclass(frozen=True)
class Prediction:
    """What the plan is expected to cost.

    Attributes:
        step_s: seconds of one training step of ``batch_rows`` samples; with the optimizer's if that was asked for.
        bubble: share of the workers' time without compute.
        bottleneck_s: largest load of a stage for one microbatch (compute and transfers), what the cut minimises.
        lower_bound_s: proven smallest bottleneck that any cut into so many stages has.
        optimal: whether the bottleneck meets the bound.
        one_device_s: the same batch on one worker without a pipeline, whole or in the same microbatches, whichever is
            faster.
        cost_source: where the seconds come from.
    """

    step_s: float
    bubble: float
    bottleneck_s: float
    lower_bound_s: float
    optimal: bool
    one_device_s: float
    cost_source: str


@dataclass(frozen=True)
class Alternative:
    """Another configuration that was considered.

    ``replicas`` has the replica count of each of its stages, which ``n_workers`` workers own; ``recomputed`` the stages
    that compute activations again.
    """

    schedule: str
    n_microbatches: int
    step_s: float
    n_workers: int
    replicas: tuple[int, ...] = ()
    recomputed: tuple[int, ...] = ()
    memory_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Who computes what and when.

    Attributes:
        format: version of this record.
        model: class of the model; fingerprint: hash of its graph, checked before the plan is used.
        batch_rows: samples of the batch that it was planned for; other sizes run too.
        n_microbatches: pieces that each replica of the widest stage cuts its share of the batch into.
        schedule: order of compute, by name.
        graph_inputs: names of the model's tensor inputs.
        ops, stages, wires: the decision.
        prediction, alternatives: what it is expected to cost, and what else was considered.
        n_threads: CPU threads that each worker is planned to compute with.
        timing: what the simulator needs beside this.
        orders: per worker of one replica of each stage, the order of compute that no name stands for, of the
            microbatches that it is given: ``2I5`` is the input gradient of its microbatch 5 in stage 2. () where
            ``schedule`` says it.
        reasons: why this plan: its cuts, its limit, its rivals, and what would help.
        ties: parameters that several stages use.
    """

    format: int
    model: str
    fingerprint: str
    batch_rows: int
    n_microbatches: int
    schedule: str
    graph_inputs: tuple[str, ...]
    ops: tuple[OpRecord, ...]
    stages: tuple[StageRecord, ...]
    wires: tuple[WireRecord, ...]
    prediction: Prediction
    alternatives: tuple[Alternative, ...]
    n_threads: int = 1
    timing: Timing = Timing()
    orders: tuple[tuple[str, ...], ...] = ()
    reasons: tuple[str, ...] = ()
    ties: tuple[TieRecord, ...] = ()

    @property
    def predicted(self) -> Timeline:
        """Return the timeline of one step that the plan was chosen for, simulated again: equal plans, equal lines."""
        from .predict import predict  # it imports torch, which reading a plan does without

        return predict(self)

    @property
    def devices(self) -> tuple[str, ...]:
        """List the workers' devices."""
        found = {worker: device for stage in self.stages for worker, device in zip(stage.workers, stage.devices)}
        return tuple(found[worker] for worker in sorted(found))

    @property
    def worker_bytes(self) -> tuple[int, ...]:
        """List what local CPU workers hold at their fullest, beside what any process does.

        Weights, gradients, the part of the other replicas' gradients that this one sums, a heap that is larger than
        what is in use of it, and what its ops are recorded as; optimizer state is in the parent process.
        """
        found = {}
        n_ops = Counter(stage for op in self.ops for stage in (op.stage, *op.copies))
        for workers in dict.fromkeys(stage.workers for stage in self.stages):
            own, n = [stage for stage in self.stages if stage.workers == workers], len(workers)
            weights = sum(stage.parameter_bytes for stage in own)
            held = own[0].device_bytes - sum(stage.memory_bytes - stage.held_bytes for stage in own)
            recordings = _RECORDING_BYTES * sum(n_ops[stage.index] for stage in own)
            tensors = 2 * weights + (n - 1) * weights // n + int(_HEAP * held)
            found.update(dict.fromkeys(workers, tensors + recordings + _SCRATCH_BYTES))
        return tuple(found[worker] for worker in sorted(found))

    @property
    def stage_of(self) -> dict[str, int]:
        """Return the stage of every op."""
        return {op.name: op.stage for op in self.ops}

    def layout(self) -> Layout:
        """Return who owns which stage and which stages exchange packets."""
        workers = tuple(stage.workers for stage in self.stages)
        pairs = sorted({(wire.source, target) for wire in self.wires for target in wire.targets})
        back = sorted({(wire.source, target) for wire in self.wires if wire.gradient for target in wire.targets})
        return Layout(workers, tuple(pairs), tuple(back))

    def as_alternative(self) -> Alternative:
        """Return what is remembered of this configuration where another one is chosen."""
        return Alternative(
            self.schedule,
            self.n_microbatches,
            self.prediction.step_s,
            len(self.devices),
            tuple(len(stage.devices) for stage in self.stages),
            tuple(stage.index for stage in self.stages if stage.recompute),
            max(stage.device_bytes for stage in self.stages),
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(to_json(self), indent=1) + "\n")

    def _pieces(self) -> str:
        shared = " a replica" if self.layout().n_replicas > 1 else ""
        return f"{count(self.batch_rows, 'row')} in {count(self.n_microbatches, 'microbatch')}{shared}"

    def _repr_html_(self) -> str | None:
        return html_of("Plan", self)

    def __str__(self) -> str:
        p = self.prediction
        proof = "proven optimal" if p.optimal else f"proven bound {ms(p.lower_bound_s)}"
        lines = [
            f"{self.model}: {count(len(self.stages), 'stage')}, {self.schedule}, {self._pieces()}, "
            f"predicted step {ms(p.step_s)} ({p.cost_source}), bubble {p.bubble:.0%}, "
            f"bottleneck {ms(p.bottleneck_s)} ({proof}); one device {ms(p.one_device_s)}",
            f"{'stage':>5}  {'devices':<16} {'ops':>5} {'forward':>10} {'backward':>10} {'params':>9} {'memory':>9}",
        ]
        for stage in self.stages:
            n_ops = sum(1 for op in self.ops if op.stage == stage.index)
            lines.append(
                f"{stage.index:>5}  {','.join(stage.devices):<16} {n_ops:>5} {ms(stage.forward_s):>10} "
                f"{ms(stage.backward_s):>10} {_size(stage.parameter_bytes):>9} {_size(stage.memory_bytes):>9}"
            )
        for wire in self.wires:
            targets = ", ".join(map(str, wire.targets))
            lines.append(f"  {wire.value}: stage {wire.source} -> {targets}, {_size(wire.n_bytes)} a microbatch")
        return "\n".join(lines)


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.3g} {unit}"


def schema() -> dict[str, Any]:
    """Describe the JSON of a plan as JSON Schema: docs/plan.schema.json."""
    found = json_schema(Plan, f"urn:stagecut:plan:{FORMAT}")
    found["$defs"]["Plan"]["properties"]["format"] = {"const": FORMAT}
    return found


def load(path: str | Path) -> Plan:
    """Read a plan and validate it.

    Raises:
        PlanError: the file is no JSON, a key is unknown or missing, a type is wrong, or the stages contradict the graph
            (a cycle, a value used before the stage that makes it); the message names the place in the file.
    """
    return read_file(path, parse)


def parse(value: object) -> Plan:
    """Build a plan from plain JSON values and validate it (see :func:`load`)."""
    if isinstance(value, dict) and value.get("format") != FORMAT:
        raise PlanError(f"$.format: this version reads format {FORMAT}, got {value.get('format')!r}")
    plan = from_json(Plan, value)
    validate(plan)
    return plan
