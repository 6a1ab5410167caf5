"""The checks that a plan from elsewhere passes before anything uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PlanError
from ..runtime.schedules import TRAINING_SCHEDULES

if TYPE_CHECKING:
    from .plan import Plan


def validate(plan: Plan) -> None:
    """Check that the records of a plan fit together.

    Raises:
        PlanError: naming the place in the file, and what is wrong with it.
    """
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
    _validate_timing(plan)
    _validate_ops(plan)
    _validate_wires(plan)


def _validate_timing(plan: Plan) -> None:
    n_workers = sum(len(stage.devices) for stage in plan.stages)
    expected = {**dict.fromkeys(("reduce_s", "store_s", "accumulate_s"), len(plan.stages)), "hosts": n_workers}
    for name, n in expected.items():
        found = len(getattr(plan.timing, name))
        if found not in (0, n):
            raise PlanError(f"$.timing.{name}: expected {n} entries or none, got {found}")


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
        for position, stage in enumerate(op.copies):
            if not op.stage < stage < len(plan.stages):
                raise PlanError(
                    f"{path}.copies[{position}]: {op.name!r} of stage {op.stage} cannot be computed again on {stage}; "
                    "copies are on later stages"
                )
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
    wired |= {(op.name, stage) for op in plan.ops for stage in (op.stage, *op.copies)}
    for index, op in enumerate(plan.ops):
        for name in op.inputs:
            for stage in (op.stage, *op.copies):
                if name in stage_of and (name, stage) not in wired:
                    raise PlanError(
                        f"$.wires: {name!r} is used by $.ops[{index}] on stage {stage}, and no wire takes it there"
                    )
