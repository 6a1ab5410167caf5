"""The tables of a plan as rows of text, for the terminal and for the page."""

from __future__ import annotations

from dataclasses import dataclass

from ..partitioner.plan import Plan
from .verdict import sent_to, stage_load_s
from .words import bar, clean, devices, duration, filled, memory, n_ops, shape, size


@dataclass(frozen=True)
class Table:
    """A header, whether each column is set to the right, and rows; ``empty`` is said when there are none."""

    header: tuple[str, ...]
    right: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]
    empty: str


def stage_table(plan: Plan) -> Table:
    """List what each stage costs for one microbatch, and what it holds."""
    header = ("stage", "devices", "ops", "forward", "backward", "load", "params", "in flight", "memory", "filled")
    loads = [stage_load_s(stage) for stage in plan.stages]
    rows = tuple(
        (
            str(stage.index),
            devices(stage),
            str(n_ops(plan, stage.index)),
            duration(stage.forward_s),
            duration(stage.backward_s),
            bar(loads[stage.index] / (max(loads) or 1.0)),
            size(stage.parameter_bytes),
            str(stage.in_flight),
            memory(stage),
            bar(filled(plan, stage)),
        )
        for stage in plan.stages
    )
    right = (True, False, True, True, True, False, True, True, True, False)
    return Table(header, right, rows, "there are no stages")


def wire_table(plan: Plan) -> Table:
    """List the values that cross between stages."""
    paths = {op.name: op.module_path for op in plan.ops}
    rows = tuple(
        (
            clean(wire.value),
            clean(paths.get(wire.value, "")),
            str(wire.source),
            ", ".join(f"{to}" if to in sent_to(plan, wire) else f"{to} (same device)" for to in wire.targets),
            size(wire.n_bytes),
            "yes" if wire.gradient else "no",
        )
        for wire in plan.wires
    )
    header = ("value", "module", "from", "to", "per microbatch", "gradient")
    return Table(header, (False, False, True, True, True, False), rows, "nothing crosses between stages")


def alternatives_table(plan: Plan) -> Table:
    """List the chosen configuration, then what else was considered, by predicted step."""
    step_s = plan.prediction.step_s
    replicas, again = [len(stage.devices) for stage in plan.stages], [s.index for s in plan.stages if s.recompute]
    own = shape(replicas, again, len(plan.devices))
    rows = [(own, plan.schedule, str(plan.n_microbatches), duration(step_s), "chosen")]
    for other in sorted(plan.alternatives, key=lambda other: (other.step_s, other.n_microbatches, other.schedule)):
        worse = f"{other.step_s / step_s - 1:+.1%}" if step_s > 0 else ""
        what = shape(other.replicas, other.recomputed, other.n_workers)
        rows.append((what, other.schedule, str(other.n_microbatches), duration(other.step_s), worse))
    header = ("stages", "schedule", "microbatches", "step", "against chosen")
    return Table(header, (False, False, True, True, True), tuple(rows), "nothing else was considered")
