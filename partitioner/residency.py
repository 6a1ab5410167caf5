"""What workers hold over a step, by the order in which they compute: microbatches of a stage, bytes of all stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..runtime.instructions import Action, Layout
from ..runtime.schedules import Orders, of_columns, of_part, shortened
from ..runtime.schedules.eager_1f1b import eager_warm_up
from ..runtime.schedules.one_f_one_b import warm_up

if TYPE_CHECKING:
    from ..runtime.program import Timeline
    from .plan import Plan, StageRecord


def orders_of(layout: Layout, schedule: str, n_pieces: int, column: Orders = ()) -> Orders:
    """Return every worker's order: of ``column``, the order of each replica, if there is one, else by name."""
    if column:
        return shortened(of_columns(column, layout), n_pieces)
    return of_part(schedule, layout, n_pieces)


def in_flight_of(layout: Layout, schedule: str, n_pieces: int, column: Orders = ()) -> list[int]:
    """Return, per stage, the microbatches whose activations one replica holds at once."""
    mine = [len(layout.microbatches_of(s, 0, n_pieces)) for s in range(layout.n_stages)]
    if schedule == "fill-drain":
        return mine
    if schedule in ("zb-h1", "zb-h2"):  # forwards ahead, and weight gradients behind
        most = layout.n_stages if schedule == "zb-h1" else 2 * layout.n_stages - 1
        return [min(most, own) for own in mine]
    if schedule in ("1f1b", "eager-1f1b"):
        held = eager_warm_up if schedule == "eager-1f1b" else warm_up
        return [min(held(layout, s), mine[s]) for s in range(layout.n_stages)]
    orders = orders_of(layout, schedule, n_pieces, column)
    return [_most_held(orders[owners[0]], {s: 1}) for s, owners in enumerate(layout.workers)]


def beside_bytes(
    stages: Sequence[StageRecord], layout: Layout, schedule: str, n_pieces: int, column: Orders = ()
) -> list[int]:
    """Return, per stage, what its workers hold beyond its own peak when they are at their fullest.

    That is nothing where every worker owns one stage; else activations are added up along the worker's order, with the
    state of all its stages, and the largest need of one of them while it computes.
    """
    if len(set(layout.workers)) == layout.n_stages:
        return [0] * layout.n_stages
    orders = orders_of(layout, schedule, n_pieces, column)
    in_all = {owners: _peak_bytes(stages, layout, owners, orders[owners[0]]) for owners in set(layout.workers)}
    return [in_all[owners] - own.memory_bytes for own, owners in zip(stages, layout.workers)]


def _peak_bytes(stages: Sequence[StageRecord], layout: Layout, owners: tuple[int, ...], order: Sequence[Action]) -> int:
    mine = [stage for stage, workers in zip(stages, layout.workers) if workers == owners]
    state = sum(stage.memory_bytes - stage.held_bytes for stage in mine)
    computing = max(stage.workspace_bytes + (stage.saved_bytes if stage.recompute else 0) for stage in mine)
    held = _most_held(order, {s.index: s.input_bytes if s.recompute else s.saved_bytes for s in mine})
    return max(state + held + computing, *(stage.memory_bytes for stage in mine))


def _most_held(order: Sequence[Action], bytes_of: dict[int, int]) -> int:
    """Return the most of so many bytes a microbatch, for some stages, that an order holds at once."""
    held = most = 0
    for action in order:
        if action.kind == "F":
            held += bytes_of.get(action.stage, 0)
            most = max(most, held)
        elif action.kind != "I":  # a stage holds all of a microbatch until its backward is through
            held -= bytes_of.get(action.stage, 0)
    return most


def memory_over_time(plan: Plan, timeline: Timeline) -> dict[int, list[tuple[float, float]]]:
    """Return, per worker, what it holds over a step: pairs of seconds and the bytes from then on.

    State of its stages all the time; activations of a microbatch from the start of its forward to the end of its
    backward (of its weight gradient, where parts run apart); what a computation needs beside, while it runs. The most
    is what the plan says of the worker's device, or less where stages are not at their fullest at the same time.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for worker in range(timeline.n_workers):
        own = {stage.index: stage for stage in plan.stages if worker in stage.workers}
        state = float(sum(stage.memory_bytes - stage.held_bytes for stage in own.values()))
        changes: list[tuple[float, int, float]] = []  # of equal times, what goes comes first
        for span in timeline.spans:
            if span.worker != worker or span.op not in ("F", "B", "I", "W"):
                continue
            stage = own[span.stage]
            held = stage.input_bytes if stage.recompute else stage.saved_bytes
            again = stage.saved_bytes if stage.recompute and span.op != "F" else 0
            beside = stage.workspace_bytes + again
            changes += [(span.start_s, 1, beside), (span.end_s, 0, -beside)]
            if span.op == "F":
                changes.append((span.start_s, 1, held))
            elif span.op != "I":
                changes.append((span.end_s, 0, -held))
        steps = [(0.0, state)]
        for second, _, change in sorted(changes):
            steps.append((second, steps[-1][1] + change))
        found[worker] = steps
    return found
