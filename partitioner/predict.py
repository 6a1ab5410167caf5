"""The prediction: a plan's step on the clock of the simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime.instructions import Layout
from ..runtime.program import Span, Timeline, lower
from ..runtime.schedules.tokens import actions_of
from .cluster import Link
from .residency import orders_of
from .simulate import StepCosts, simulate

if TYPE_CHECKING:
    from .plan import Plan


def predict(plan: Plan) -> Timeline:
    """Simulate one step of ``plan``, from the plan alone.

    Where all stages have as many replicas and none share cores, one replica of each stands for the others.
    """
    layout = plan.layout()
    n_alike = _n_alike(plan, layout)
    timeline = predict_column(plan)
    if n_alike == 1:
        return timeline
    spans = [
        Span(layout.workers[s.stage][r], s.op, s.stage, _microbatch(s, r, n_alike), s.start_s, s.end_s)
        for r in range(n_alike)
        for s in timeline.spans
    ]
    ordered = sorted(spans, key=lambda span: (span.worker, span.start_s, span.end_s))
    return Timeline(timeline.source, layout.n_workers, tuple(ordered))


def predict_column(plan: Plan) -> Timeline:
    """Simulate one step with one replica of each stage, if the others do the same beside it; else with all."""
    layout = plan.layout()
    n_alike = _n_alike(plan, layout)
    if n_alike == 1:
        return _simulated(plan, layout, _n_pieces(plan, layout))
    place = {owners: (at,) for at, owners in enumerate(dict.fromkeys(layout.workers))}
    column = Layout(tuple(place[owners] for owners in layout.workers), layout.wires, layout.gradient_wires)
    return _simulated(plan, column, _n_pieces(plan, layout) // n_alike)


def _n_pieces(plan: Plan, layout: Layout) -> int:
    return min(plan.batch_rows, plan.n_microbatches * layout.n_replicas)


def _n_alike(plan: Plan, layout: Layout) -> int:
    """Count the replicas that do the same at the same time; 1 where they may differ."""
    counts = {len(owners) for owners in layout.workers}
    uneven = len(counts) > 1 or _n_pieces(plan, layout) % layout.n_replicas
    return 1 if uneven or plan.timing.n_cores is not None else counts.pop()


def _microbatch(span: Span, replica: int, n_alike: int) -> int:
    return span.microbatch if span.microbatch < 0 else span.microbatch * n_alike + replica


def packets_of(plan: Plan, *, gradients: bool) -> dict[tuple[int, int], float]:
    """Return, per pair of stages, the bytes of one packet of values, or of their gradients."""
    packets: dict[tuple[int, int], float] = {}
    for wire in plan.wires:
        for target in wire.targets if wire.gradient or not gradients else ():
            packets[wire.source, target] = packets.get((wire.source, target), 0.0) + wire.n_bytes
    return packets


def _simulated(plan: Plan, layout: Layout, n_pieces: int) -> Timeline:
    timing = plan.timing
    packets, back = packets_of(plan, gradients=False), packets_of(plan, gradients=True)
    orders = orders_of(layout, plan.schedule, n_pieces, actions_of(plan.orders))
    program = lower(plan.schedule, layout, orders, n_pieces)
    timeline = simulate(
        program,
        StepCosts(
            forward_s=tuple(stage.forward_s for stage in plan.stages),
            backward_s=tuple(stage.backward_s for stage in plan.stages),
            backward_input_s=tuple(timing.split * (s.backward_s - s.backward_weight_s) for s in plan.stages),
            backward_weight_s=tuple(timing.split * s.backward_weight_s for s in plan.stages),
            packet_bytes=packets,
            gradient_bytes=back,
            link=Link(0.0, float("inf"), timing.source),
            links={(r.source, r.target): Link(r.latency_s, r.bytes_per_s, timing.source) for r in timing.links},
            action_overhead_s=timing.action_s,
            send_overhead_s=timing.send_s,
            pack_bytes_per_s=float("inf") if timing.pack_bytes_per_s is None else timing.pack_bytes_per_s,
            reduce_s=timing.reduce_s,
            reduce_buckets=timing.reduce_buckets,
            store_s=timing.store_s,
            accumulate_s=timing.accumulate_s,
            optimizer_s=timing.optimizer_s,
            hosts=timing.hosts[: layout.n_workers],
            n_cores=timing.n_cores,
            beside=timing.beside,
            sharing=timing.sharing,
        ),
    )
    later = timing.start_s
    spans = [Span(s.worker, s.op, s.stage, s.microbatch, s.start_s + later, s.end_s + later) for s in timeline.spans]
    return Timeline(timeline.source, timeline.n_workers, tuple(spans))
