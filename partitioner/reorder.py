"""Plans with an order of compute of their own: searched for their very costs and memory, or read from a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import InfeasibleError
from ..runtime.instructions import Layout
from ..runtime.schedules import SEARCH, Orders
from ..runtime.schedules.tokens import token
from .placing import placement_of
from .plan import Plan, StageRecord
from .plan_check import check_orders
from .predict import packets_of, predict_column
from .residency import beside_bytes, in_flight_of
from .scheduling import PipelineCosts, search
from .scheduling.bounds import lower_bound_s
from .scheduling.clock import Problem
from .scheduling.family import placed

MOST_ACTIONS = 20_000  # of a step; more are not searched
_LISTED = ("chain", "loop", "vee")


def with_orders(plan: Plan, name: str, orders: Orders) -> Plan:
    """Return ``plan`` with another order of compute, and what it holds and takes then.

    ``orders`` has one order for each worker of one replica, in the order in which stages first name them; replicas do
    the same with microbatches of their own.

    Raises:
        PlanError: the orders do not compute what the plan's stages have to.
        ConstraintError: they wait for each other.
    """
    check_orders(orders, [stage.workers for stage in plan.stages], plan.n_microbatches)
    layout = plan.layout()
    n_pieces = min(plan.batch_rows, plan.n_microbatches * layout.n_replicas)
    stages = tuple(
        _holding(stage, n) for stage, n in zip(plan.stages, in_flight_of(layout, name, n_pieces, orders), strict=True)
    )
    more = beside_bytes(stages, layout, name, n_pieces, orders)
    plan = replace(
        plan,
        schedule=name,
        orders=tuple(tuple(map(token, order)) for order in orders),
        stages=tuple(replace(stage, beside_bytes=n_bytes) for stage, n_bytes in zip(stages, more)),
    )
    timeline = predict_column(plan)
    own = replace(plan.prediction, step_s=timeline.makespan_s, bubble=timeline.bubble)
    return replace(plan, prediction=own)


def _holding(stage: StageRecord, in_flight: int) -> StageRecord:
    state = stage.memory_bytes - stage.held_bytes
    stage = replace(stage, in_flight=in_flight)
    return replace(stage, memory_bytes=state + stage.held_bytes)


def searched(plan: Plan, time_s: float, progress: Callable[[str], None] = lambda what: None) -> Plan | None:
    """Search an order for a plan's stages where they are, within the memory of its devices.

    With backwards in two parts and in one, which take different times; ``time_s`` as in :func:`search`. Equal plans,
    equal orders.

    Returns:
        The plan with the order that the simulator predicts to be faster; None where there is nothing to search: one
        stage, stages of different replica counts, or too many computations.
    """
    placement = _placement(plan)
    if placement is None:
        return None
    found = []
    for splits in _ways_to_split(plan):
        try:
            best = search(
                costs_of(plan, splits),
                plan.n_microbatches,
                len({stage.workers for stage in plan.stages}),
                time_s=time_s / 2,
                placements=(placement,),
                progress=progress,
            )
        except InfeasibleError:
            continue
        made = with_orders(plan, SEARCH, best.orders)
        if all(stage.device_bytes <= stage.memory_limit_bytes for stage in made.stages):
            found.append(made)
    return min(found, key=lambda made: made.prediction.step_s, default=None)


def least_s(plan: Plan) -> float:
    """Bound the compute of a step from below for all orders that :func:`searched` looks at.

    These have backwards all in one or all in two parts. Infinite where no order can be searched.
    """
    placement = _placement(plan)
    if placement is None:
        return float("inf")
    layout = placed(len(plan.stages), len({stage.workers for stage in plan.stages}), placement)
    problems = (Problem(costs_of(plan, splits), layout, plan.n_microbatches) for splits in _ways_to_split(plan))
    return min(map(lower_bound_s, problems))


def _placement(plan: Plan) -> str | None:
    """Name how a plan's stages are placed; None where no order can be searched."""
    owners = {stage.workers for stage in plan.stages}
    placement = placement_of([stage.workers for stage in plan.stages])
    uneven = len({len(workers) for workers in owners}) > 1
    n_actions = 3 * len(plan.stages) * plan.n_microbatches
    searchable = len(owners) > 1 and not uneven and placement in _LISTED and n_actions <= MOST_ACTIONS
    return placement if searchable else None


def _ways_to_split(plan: Plan) -> tuple[bool, ...]:
    return (False, True) if any(stage.backward_weight_s for stage in plan.stages) else (False,)


def costs_of(plan: Plan, splits: bool) -> PipelineCosts:
    """Return a plan's costs for one replica of each stage, as the search takes them.

    What sending keeps a worker busy for is part of the computation before it, and what all weight gradients have of
    moving or adding to others is part of these. A stage holds all of a microbatch until its weight gradient is through.
    A link costs what it does from one stage to the next.
    """
    timing, layout = plan.timing, plan.layout()
    stages = plan.stages
    factor = timing.split if splits else 1.0
    nothing = (0.0,) * len(stages)
    adding = tuple(map(min, timing.accumulate_s or nothing, timing.store_s or nothing))
    sends, back = (_sending_s(plan, layout, gradients) for gradients in (False, True))
    held = [float(s.input_bytes if s.recompute else s.saved_bytes) for s in stages]
    link_s = [0.0] * (len(stages) - 1)
    packets = packets_of(plan, gradients=False)
    for link in timing.links:
        if link.target == link.source + 1:
            n_bytes = packets.get((link.source, link.target), 0.0)
            link_s[link.source] = link.latency_s + n_bytes / link.bytes_per_s
    return PipelineCosts(
        forward_s=tuple(stage.forward_s + more for stage, more in zip(stages, sends)),
        backward_input_s=tuple(factor * (s.backward_s - s.backward_weight_s) + more for s, more in zip(stages, back)),
        backward_weight_s=tuple(factor * stage.backward_weight_s + more for stage, more in zip(stages, adding)),
        activation_bytes=tuple(held),
        weight_grad_bytes=tuple(held),
        link_s=tuple(link_s),
        memory_bytes=tuple(map(float, _room(plan))),
        op_overhead_s=timing.action_s,
        split_backward=splits,
    )


def _sending_s(plan: Plan, layout: Layout, gradients: bool) -> list[float]:
    """Return, per stage, the seconds that sending its packets of one microbatch keeps its worker busy for."""
    timing = plan.timing
    sending = [0.0] * len(plan.stages)
    for (source, target), n_bytes in packets_of(plan, gradients=gradients).items():
        if layout.workers[source] != layout.workers[target]:
            packing_s = 0.0 if timing.pack_bytes_per_s is None else n_bytes / timing.pack_bytes_per_s
            sending[target if gradients else source] += timing.send_s + packing_s
    return sending


def _room(plan: Plan) -> Sequence[float]:
    """Return what each worker of a replica has for activations: its limit without state, and the most to compute."""
    room = []
    for workers in dict.fromkeys(stage.workers for stage in plan.stages):
        own = [stage for stage in plan.stages if stage.workers == workers]
        state = sum(stage.memory_bytes - stage.held_bytes for stage in own)
        computing = max(stage.workspace_bytes + (stage.saved_bytes if stage.recompute else 0) for stage in own)
        room.append(max(0.0, own[0].memory_limit_bytes - state - computing))
    return room


def given(plan: Plan, name: str, orders: Orders) -> Plan:
    """Return ``plan`` in the order that a user gave.

    Raises:
        PlanError, ConstraintError: as :func:`with_orders`.
        InfeasibleError: a device would hold more than it has.
    """
    made = with_orders(plan, name, orders)
    for stage in made.stages:
        if stage.device_bytes > stage.memory_limit_bytes:
            missing = stage.device_bytes - stage.memory_limit_bytes
            raise InfeasibleError(
                f"in the order that was given, the device of stage {stage.index} holds {stage.device_bytes:,} bytes, "
                f"{missing:,.0f} more than its {stage.memory_limit_bytes:,.0f}",
                hint=f"raise memory_bytes by {missing:,.0f}, or make an order with fewer microbatches in flight",
            )
    return made
