"""The plan: the whole decision as one frozen record, printable, and JSON both ways."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import PlanError
from ..records import from_json, to_json
from ..runtime.instructions import Layout
from ..runtime.schedules import TRAINING_SCHEDULES

FORMAT = 1


@dataclass(frozen=True)
class OpRecord:
    """One op: what it is, where it comes from, which stage runs it, what it costs for one microbatch."""

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


@dataclass(frozen=True)
class StageRecord:
    """One stage: the devices of its replicas, and what one microbatch costs there.

    ``memory_bytes`` is the predicted peak of one replica: parameters with gradients and optimizer state, plus what is
    saved for the microbatches in flight.
    """

    index: int
    devices: tuple[str, ...]
    forward_s: float
    backward_s: float
    parameter_bytes: int
    saved_bytes: int
    in_flight: int
    memory_bytes: int
    memory_limit_bytes: float


@dataclass(frozen=True)
class WireRecord:
    """One value that crosses from the stage that makes it to stages that use it, per microbatch."""

    value: str
    source: int
    targets: tuple[int, ...]
    n_bytes: int
    gradient: bool


@dataclass(frozen=True)
class Prediction:
    """What the plan is expected to cost.

    Attributes:
        step_s: seconds of one training step of ``batch_rows`` samples, optimizer excluded.
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
    """Another configuration that was considered."""

    schedule: str
    n_microbatches: int
    step_s: float


@dataclass(frozen=True)
class Plan:
    """Who computes what and when.

    Attributes:
        format: version of this record.
        model: class of the model; fingerprint: hash of its graph, checked before the plan is used.
        batch_rows: samples of the batch that it was planned for; other sizes run too.
        n_microbatches: pieces that each replica of the widest stage cuts its share of the batch into.
        schedule: order of compute.
        graph_inputs: names of the model's tensor inputs.
        ops, stages, wires: the decision.
        prediction, alternatives: what it is expected to cost, and what else was considered.
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

    @property
    def devices(self) -> tuple[str, ...]:
        """List the workers' devices, stage by stage, replica by replica."""
        return tuple(device for stage in self.stages for device in stage.devices)

    @property
    def stage_of(self) -> dict[str, int]:
        """Return the stage of every op."""
        return {op.name: op.stage for op in self.ops}

    def layout(self) -> Layout:
        """Return who owns which stage and which stages exchange packets."""
        workers: list[tuple[int, ...]] = []
        for stage in self.stages:
            first = sum(len(owners) for owners in workers)
            workers.append(tuple(range(first, first + len(stage.devices))))
        pairs = sorted({(wire.source, target) for wire in self.wires for target in wire.targets})
        back = sorted({(wire.source, target) for wire in self.wires if wire.gradient for target in wire.targets})
        return Layout(tuple(workers), tuple(pairs), tuple(back))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(to_json(self), indent=1) + "\n")

    def __str__(self) -> str:
        p = self.prediction
        proof = "proven optimal" if p.optimal else f"proven bound {_ms(p.lower_bound_s)}"
        lines = [
            f"{self.model}: {len(self.stages)} stages, {self.schedule}, {self.n_microbatches} microbatches of "
            f"{self.batch_rows} rows, predicted step {_ms(p.step_s)} ({p.cost_source}), bubble {p.bubble:.0%}, "
            f"bottleneck {_ms(p.bottleneck_s)} ({proof}); one device {_ms(p.one_device_s)}",
            f"{'stage':>5}  {'devices':<16} {'ops':>5} {'forward':>10} {'backward':>10} {'params':>9} {'memory':>9}",
        ]
        for stage in self.stages:
            n_ops = sum(1 for op in self.ops if op.stage == stage.index)
            lines.append(
                f"{stage.index:>5}  {','.join(stage.devices):<16} {n_ops:>5} {_ms(stage.forward_s):>10} "
                f"{_ms(stage.backward_s):>10} {_size(stage.parameter_bytes):>9} {_size(stage.memory_bytes):>9}"
            )
        for wire in self.wires:
            targets = ", ".join(map(str, wire.targets))
            lines.append(f"  {wire.value}: stage {wire.source} -> {targets}, {_size(wire.n_bytes)} a microbatch")
        return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.3g} {unit}"


def load(path: str | Path) -> Plan:
    """Read a plan and validate it.

    Raises:
        PlanError: the file is no JSON, a key is unknown or missing, a type is wrong, or the stages contradict the graph
            (a cycle, a value used before the stage that makes it); the message names the place in the file.
    """
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: no JSON: {error}") from error
    try:
        return parse(value)
    except PlanError as error:
        raise PlanError(f"{path}: {error.message}", hint=error.hint) from error


def parse(value: object) -> Plan:
    """Build a plan from plain JSON values and validate it (see :func:`load`)."""
    if isinstance(value, dict) and value.get("format") != FORMAT:
        raise PlanError(f"$.format: this version reads format {FORMAT}, got {value.get('format')!r}")
    plan = from_json(Plan, value)
    _validate(plan)
    return plan


def _validate(plan: Plan) -> None:
    if not plan.stages:
        raise PlanError("$.stages: a plan has at least one stage")
    for index, stage in enumerate(plan.stages):
        if stage.index != index:
            raise PlanError(f"$.stages[{index}].index: expected {index}, got {stage.index}")
        if not stage.devices:
            raise PlanError(f"$.stages[{index}].devices: a stage has at least one device")
    for name in ("batch_rows", "n_microbatches"):
        if getattr(plan, name) < 1:
            raise PlanError(f"$.{name}: expected at least 1, got {getattr(plan, name)}")
    if plan.schedule not in TRAINING_SCHEDULES:
        raise PlanError(f"$.schedule: unknown schedule {plan.schedule!r}; known: {', '.join(TRAINING_SCHEDULES)}")
    _validate_ops(plan)
    _validate_wires(plan)


def _validate_ops(plan: Plan) -> None:
    seen: dict[str, int] = dict.fromkeys(plan.graph_inputs, 0)
    names = {op.name for op in plan.ops}
    for index, op in enumerate(plan.ops):
        path = f"$.ops[{index}]"
        if not 0 <= op.stage < len(plan.stages):
            raise PlanError(f"{path}.stage: {op.name!r} is on stage {op.stage}; there are {len(plan.stages)} stages")
        if op.name in seen:
            raise PlanError(f"{path}.name: {op.name!r} stands twice")
        for position, name in enumerate(op.inputs):
            if name not in seen:
                why = (
                    "is listed after it: the ops form a cycle or are out of order"
                    if name in names
                    else "does not exist"
                )
                raise PlanError(f"{path}.inputs[{position}]: {op.name!r} uses {name!r}, which {why}")
            if seen[name] > op.stage:
                raise PlanError(
                    f"{path}.stage: {op.name!r} on stage {op.stage} uses {name!r} of the later stage {seen[name]}; "
                    "stages must be convex: every value flows to the same or a later stage"
                )
        seen[op.name] = op.stage
    used = {op.stage for op in plan.ops}
    for index in range(len(plan.stages)):
        if index not in used:
            raise PlanError(f"$.stages[{index}]: no op runs on this stage")


def _validate_wires(plan: Plan) -> None:
    stage_of = plan.stage_of
    wired: set[tuple[str, int]] = set()
    for index, wire in enumerate(plan.wires):
        path = f"$.wires[{index}]"
        if wire.value not in stage_of:
            raise PlanError(f"{path}.value: no op is called {wire.value!r}")
        if stage_of[wire.value] != wire.source:
            raise PlanError(f"{path}.source: {wire.value!r} is made on stage {stage_of[wire.value]}, not {wire.source}")
        for position, target in enumerate(wire.targets):
            if not wire.source < target < len(plan.stages):
                raise PlanError(
                    f"{path}.targets[{position}]: a value of stage {wire.source} cannot cross to stage {target}; "
                    "stages form a cycle or do not exist"
                )
            wired.add((wire.value, target))
    for index, op in enumerate(plan.ops):
        for name in op.inputs:
            if name in stage_of and stage_of[name] != op.stage and (name, op.stage) not in wired:
                raise PlanError(
                    f"$.wires: {name!r} is used by $.ops[{index}] on stage {op.stage}, and no wire takes it there"
                )
