"""The checks that a plan from elsewhere passes before anything uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConstraintError, PlanError
from ..runtime.instructions import Action
from ..runtime.schedules import GIVEN, SEARCH, TRAINING_SCHEDULES, Orders, of_part
from ..runtime.schedules.tokens import actions_of, token

if TYPE_CHECKING:
    from .plan import Plan

_ROUNDED = 1 + 1e-9  # parts are sums of other numbers than the whole


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
    _validate_workers(plan)
    for name in ("batch_rows", "n_microbatches"):
        if getattr(plan, name) < 1:
            raise PlanError(f"$.{name}: expected at least 1, got {getattr(plan, name)}")
    _validate_schedule(plan)
    _validate_timing(plan)
    _validate_ops(plan)
    _validate_wires(plan)
    _validate_ties(plan)
    _validate_numbers(plan)


def _validate_workers(plan: Plan) -> None:
    """Workers are numbered without gaps, each has one device, and stages that share one share all of them."""
    owners: dict[int, tuple[int, ...]] = {}
    devices: dict[int, str] = {}
    for index, stage in enumerate(plan.stages):
        path = f"$.stages[{index}].workers"
        if len(stage.workers) != len(stage.devices) or len(set(stage.workers)) < len(stage.workers):
            raise PlanError(f"{path}: expected a worker of its own for each of {stage.devices}, got {stage.workers}")
        for worker, device in zip(stage.workers, stage.devices):
            if worker < 0:
                raise PlanError(f"{path}: workers are numbered from 0, got {worker}")
            if owners.setdefault(worker, stage.workers) != stage.workers:
                raise PlanError(
                    f"{path}: worker {worker} is of a stage with workers {owners[worker]} too; stages that share one "
                    "share all"
                )
            if devices.setdefault(worker, device) != device:
                raise PlanError(f"{path}: worker {worker} is on {device} here and on {devices[worker]} before")
    if sorted(owners) != list(range(len(owners))):
        raise PlanError(f"$.stages: workers must be numbered from 0 without gaps, got {sorted(owners)}")


def _validate_schedule(plan: Plan) -> None:
    """The schedule is known and allows these stages; or its order is there, and computes everything once."""
    if not plan.orders:
        if plan.schedule not in TRAINING_SCHEDULES:
            raise PlanError(f"$.schedule: unknown schedule {plan.schedule!r}; known: {', '.join(TRAINING_SCHEDULES)}")
        try:
            of_part(plan.schedule, plan.layout(), 1)  # what it allows does not depend on how many there are
        except ConstraintError as error:
            raise PlanError(f"$.schedule: {error.message}") from error
        return
    if plan.schedule not in (SEARCH, GIVEN):
        raise PlanError(f"$.schedule: orders are there, so it must be {SEARCH!r} or {GIVEN!r}, got {plan.schedule!r}")
    try:
        orders = actions_of(plan.orders)
    except ConstraintError as error:
        raise PlanError(error.message) from error
    check_orders(orders, [stage.workers for stage in plan.stages], plan.n_microbatches)


def check_orders(orders: Orders, workers: Sequence[tuple[int, ...]], n_microbatches: int) -> None:
    """Check that the orders of one replica of every stage compute all that belongs to them, once.

    Raises:
        PlanError: naming what is missing, there twice, or elsewhere.
    """
    owners = tuple(dict.fromkeys(workers))
    if len({len(own) for own in owners}) > 1:
        raise PlanError("$.orders: an order of its own needs as many replicas of every stage")
    if len(orders) != len(owners):
        raise PlanError(f"$.orders: expected {len(owners)}, one for each worker of a replica, got {len(orders)}")
    seen: set[Action] = set()
    for w, order in enumerate(orders):
        for place, action in enumerate(order):
            path, s = f"$.orders[{w}][{place}]", action.stage
            if s >= len(workers) or workers[s] != owners[w]:
                raise PlanError(f"{path}: {token(action)} is of a stage that this worker does not own")
            if action in seen or action.microbatch >= n_microbatches:
                raise PlanError(f"{path}: {token(action)} is there twice, or of no microbatch")
            seen.add(action)
    for s in range(len(workers)):
        for m in range(n_microbatches):
            parts = {kind for kind in "FBIW" if Action(kind, s, m) in seen}
            if parts not in ({"F", "B"}, {"F", "I", "W"}):
                raise PlanError(f"$.orders: stage {s} computes {sorted(parts)} of microbatch {m}")


def _validate_timing(plan: Plan) -> None:
    n_workers = len(plan.devices)
    expected = {
        **dict.fromkeys(("reduce_s", "reduce_buckets", "store_s", "accumulate_s", "optimizer_s"), len(plan.stages)),
        "hosts": n_workers,
    }
    for name, n in expected.items():
        found = len(getattr(plan.timing, name))
        if found not in (0, n):
            raise PlanError(f"$.timing.{name}: expected {n} entries or none, got {found}")
    if min(plan.timing.reduce_buckets, default=1) < 1:
        raise PlanError("$.timing.reduce_buckets: a reduction goes in at least one part")


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


def _validate_ties(plan: Plan) -> None:
    """A tie joins ops of several stages."""
    stage_of = plan.stage_of
    for index, tie in enumerate(plan.ties):
        path = f"$.ties[{index}]"
        unknown = [name for name in tie.ops if name not in stage_of]
        if unknown:
            raise PlanError(f"{path}.ops: there is no op {unknown[0]!r}")
        if len({stage_of[name] for name in tie.ops}) < 2:
            raise PlanError(f"{path}.ops: expected ops of several stages, got {', '.join(tie.ops) or 'none'}")


def _validate_numbers(plan: Plan) -> None:
    """Nothing takes less than no time or bytes, and what others are divided by is above 0."""
    lists = {"ops": plan.ops, "stages": plan.stages, "wires": plan.wires, "ties": plan.ties}
    lists |= {"alternatives": plan.alternatives, "timing.links": plan.timing.links}
    for name, records in lists.items():
        for index, record in enumerate(records):
            _require_not_negative(f"$.{name}[{index}]", record)
    _require_not_negative("$.timing", plan.timing)
    _require_not_negative("$.prediction", plan.prediction)
    timing = plan.timing
    divisors = {f"timing.links[{i}].bytes_per_s": link.bytes_per_s for i, link in enumerate(timing.links)}
    for name in ("split", "beside", "sharing", "pack_bytes_per_s", "n_cores"):
        divisors[f"timing.{name}"] = getattr(timing, name)
    divisors["n_threads"] = plan.n_threads
    for name, number in divisors.items():
        if number is not None and number <= 0:
            raise PlanError(f"$.{name}: expected a number above 0, got {number}")
    for index, stage in enumerate(plan.stages):
        if stage.backward_weight_s > stage.backward_s * _ROUNDED:
            raise PlanError(
                f"$.stages[{index}].backward_weight_s: expected a part of backward_s ({stage.backward_s}), got "
                f"{stage.backward_weight_s}"
            )


def _require_not_negative(path: str, record: object) -> None:
    for name, value in vars(record).items():
        for position, number in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(number, (int, float)) and number < 0:
                place = f"{name}[{position}]" if isinstance(value, tuple) else name
                raise PlanError(f"{path}.{place}: expected at least 0, got {number}")
