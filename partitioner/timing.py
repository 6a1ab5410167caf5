"""What the simulator needs to know about the runtime and the links, for the devices of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from .cluster import Cluster, Link
from .plan import LinkRecord, StageRecord, Timing, WireRecord

# The runtime's own work on CPU workers: per packet (header, message) and how fast packets are packed, as
# benchmarks/overhead.py measures them on two cores; per compute instruction (waiting, bookkeeping, autograd's start)
# what that benchmark leaves once sends and the tiny compute are taken off; per step, commands to workers and answers.
ACTION_S = 150e-6
SEND_S = 220e-6
PACK_BYTES_PER_S = 1.2e9
STEP_S = 2e-3
# A reduction over CPU replicas overlaps with the last backward, but takes that backward's cores: with two replicas on
# two cores, backwards of an MLP with 50 MB of gradients took 73 ms longer than one replica's.
REDUCE_BYTES_PER_S = 0.69e9


def timing_of(
    cluster: Cluster, stages: Sequence[StageRecord], wires: Sequence[WireRecord], loss_s: tuple[float, float]
) -> Timing:
    """Describe the runtime on the devices of ``cluster``, whose groups are the stages, with the loss's seconds."""
    assert cluster.groups is not None
    pairs = sorted({(wire.source, target) for wire in wires for target in wire.targets})
    links = tuple(_record(cluster, source, target) for source, target in pairs)
    on_cpu = all(device.kind.name == "cpu" for device in cluster.devices)
    reduce_s = tuple(_reduce_s(stage, cluster, group, on_cpu) for stage, group in zip(stages, cluster.groups))
    accumulate_s = tuple(_accumulate_s(stage, cluster, group) for stage, group in zip(stages, cluster.groups))
    if not on_cpu:
        return Timing(links, reduce_s=reduce_s, accumulate_s=accumulate_s, loss_s=loss_s, source=cluster.inside.source)
    finish_s = [0.0] * cluster.n_devices
    for stage, group in zip(stages, cluster.groups):
        bandwidth = cluster.devices[group[0]].kind.bytes_per_s
        finish_s[group[0]] += 2 * stage.parameter_bytes / bandwidth  # gradients are copied to the parent's memory
    return Timing(
        links,
        action_s=ACTION_S,
        send_s=SEND_S,
        pack_bytes_per_s=PACK_BYTES_PER_S,
        reduce_s=reduce_s,
        accumulate_s=accumulate_s,
        loss_s=loss_s,
        start_s=STEP_S,
        finish_s=tuple(finish_s),
        hosts=tuple(device.host for device in cluster.devices),
        n_cores=cluster.n_cores,
        source=f"{cluster.inside.source}; the runtime's own work: benchmarks/overhead.py",
    )


def _record(cluster: Cluster, source: int, target: int) -> LinkRecord:
    assert cluster.groups is not None
    link = cluster.slowest_link([*cluster.groups[source], *cluster.groups[target]])
    if set(cluster.groups[source]) == set(cluster.groups[target]):
        link = Link(0.0, 2.0**62, "the same worker")
    return LinkRecord(source, target, link.latency_s, link.bytes_per_s)


def _accumulate_s(stage: StageRecord, cluster: Cluster, group: Sequence[int]) -> float:
    """Price adding the gradients of a microbatch to older ones: two reads and a write."""
    return 3 * stage.parameter_bytes / min(cluster.devices[index].kind.bytes_per_s for index in group)


def _reduce_s(stage: StageRecord, cluster: Cluster, group: Sequence[int], on_cpu: bool) -> float:
    """Price a ring all-reduce of the stage's gradients, as if no backward hid it; on CPU it does not.

    Patarasuk and Yuan, 2009 (https://doi.org/10.1016/j.jpdc.2008.09.002).
    """
    n = len(group)
    if n == 1:
        return 0.0
    link = cluster.slowest_link(group)
    bytes_per_s = min(link.bytes_per_s, REDUCE_BYTES_PER_S) if on_cpu else link.bytes_per_s
    return 2 * (n - 1) / n * stage.parameter_bytes / bytes_per_s + 2 * (n - 1) * link.latency_s
