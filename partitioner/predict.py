"""The prediction: a plan's step on the clock of the simulator."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.program import Timeline, check, lower
from ..runtime.schedules import schedule
from .cluster import Cluster
from .plan import Plan, StageRecord
from .simulate import StepCosts, simulate

# The runtime's own work on CPU workers: per packet (header, message) and how fast packets are packed, as
# benchmarks/overhead.py measures them on two cores; per compute instruction (waiting, bookkeeping, autograd's start)
# what that benchmark leaves once sends and the tiny compute are taken off.
ACTION_OVERHEAD_S = 150e-6
SEND_OVERHEAD_S = 220e-6
PACK_BYTES_PER_S = 1.2e9


def predict(plan: Plan, cluster: Cluster) -> Timeline:
    """Simulate one step of ``plan``."""
    layout = plan.layout()
    n_pieces = min(plan.batch_rows, plan.n_microbatches * layout.n_replicas)
    program = lower(plan.schedule, layout, schedule(plan.schedule, layout, n_pieces), n_pieces)
    check(program)
    packets: dict[tuple[int, int], float] = {}
    for wire in plan.wires:
        for target in wire.targets:
            packets[wire.source, target] = packets.get((wire.source, target), 0.0) + wire.n_bytes
    on_cpu = any(device.kind.name == "cpu" for device in cluster.devices)
    return simulate(
        program,
        StepCosts(
            forward_s=tuple(stage.forward_s for stage in plan.stages),
            backward_s=tuple(stage.backward_s for stage in plan.stages),
            packet_bytes=packets,
            link=cluster.slowest_link(range(cluster.n_devices)),
            action_overhead_s=ACTION_OVERHEAD_S if on_cpu else 0.0,
            send_overhead_s=SEND_OVERHEAD_S if on_cpu else 0.0,
            pack_bytes_per_s=PACK_BYTES_PER_S if on_cpu else float("inf"),
            reduce_s=tuple(_reduce_s(stage, cluster, workers) for stage, workers in zip(plan.stages, layout.workers)),
        ),
    )


def _reduce_s(stage: StageRecord, cluster: Cluster, workers: Sequence[int]) -> float:
    """Price a ring all-reduce of the stage's gradients, as if no backward hid it (Patarasuk and Yuan, 2009)."""
    n = len(workers)
    if n == 1:
        return 0.0
    link = cluster.slowest_link(workers)
    return 2 * (n - 1) / n * stage.parameter_bytes / link.bytes_per_s + link.latency_s
