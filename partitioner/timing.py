"""What the simulator needs to know about the runtime and the links, for the devices of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from .cluster import Cluster, Link
from .cpu import cpu_link
from .opgraph import STATE_COPIES
from .plan import LinkRecord, StageRecord, Timing, WireRecord

# The runtime's own work on CPU workers: per packet (header, message) and how fast packets are packed, as
# benchmarks/overhead.py measures them on two cores, through shared memory and, where ranks may be on several machines,
# through sockets; per compute instruction (waiting, bookkeeping, autograd's start) what that benchmark leaves once
# sends and the tiny compute are taken off; per step, commands to workers and answers.
ACTION_S = 90e-6
STEP_S = 1e-3
_SEND_S, _PACK_BYTES_PER_S = 45e-6, 5.5e9
_SOCKET_SEND_S, _SOCKET_PACK_BYTES_PER_S = 220e-6, 1.2e9
# Gradients lie in memory that was last used a step ago. Copying a gradient there, right after it was made, and adding
# one such to another both take about this many times as long as the bandwidth of a copy within caches says of as many
# bytes; adding a fresh one takes three quarters of that (50 MB of gradients: 8.6, 8.2 and 6.3 ms at 29 GB/s).
_GRADIENT_COPIES = 5.0
_ADDING_FRESH = 0.75
# Workers that take turns on a core find each other's data in its caches: four processes on two cores took 2.13 (matrix
# products), 2.09 (transformer) and 2.06 (MLP) times as long as two.
SHARING = 1.05
# Two processes on two cores took 1.00 to 1.04 times as long as one alone (ResNet-50, a transformer, an MLP).
BESIDE = 1.02
# Input and weight gradients apart: what 1.03 times as long a forward and backward leaves for the backward alone
# (benchmarks/split_backward.py: transformer 1.021, ResNet-50 1.026).
SPLIT = 1.04
_BUCKET_BYTES = 25 << 20  # DistributedDataParallel's bucket_cap_mb
# How often an optimizer's step reads or writes as many bytes as the weights have: weights, gradients, moments.
OPTIMIZERS = {"sgd": 3, "momentum": 5, "adamw": 7}
REDUCE_S = 0.5e-3  # until replicas have heard of each other that they are there


def timing_of(
    cluster: Cluster,
    stages: Sequence[StageRecord],
    wires: Sequence[WireRecord],
    loss_s: tuple[float, float],
    optimizer: str | None = None,
) -> Timing:
    """Describe the runtime on the devices of ``cluster``, whose groups are the stages, with the loss's seconds.

    ``optimizer`` names one of ``OPTIMIZERS``, whose steps on accelerators are priced by their traffic.
    """
    assert cluster.groups is not None
    pairs = sorted({(wire.source, target) for wire in wires for target in wire.targets})
    links = tuple(_record(cluster, source, target) for source, target in pairs)
    on_cpu = all(device.kind.name == "cpu" for device in cluster.devices)
    owned = list(zip(stages, cluster.groups))
    if not on_cpu:
        return Timing(
            links,
            reduce_s=tuple(_all_reduce_s(stage, cluster, group) for stage, group in owned),
            reduce_buckets=tuple(max(1, -(-stage.parameter_bytes // _BUCKET_BYTES)) for stage in stages),
            accumulate_s=tuple(3 * stage.parameter_bytes / _bandwidth(cluster, group) for stage, group in owned),
            optimizer_s=()
            if optimizer is None
            else tuple(OPTIMIZERS[optimizer] * _trained(stage) / _bandwidth(cluster, group) for stage, group in owned),
            loss_s=loss_s,
            split=SPLIT,
            source=cluster.inside.source,
        )
    store_s = tuple(_GRADIENT_COPIES * stage.parameter_bytes / _bandwidth(cluster, group) for stage, group in owned)
    return Timing(
        links,
        action_s=ACTION_S,
        send_s=_SEND_S if _in_shared_memory(cluster) else _SOCKET_SEND_S,
        pack_bytes_per_s=pack_bytes_per_s(cluster),
        reduce_s=tuple(
            _all_reduce_s(stage, cluster, group) if _spans_hosts(cluster, group) else _sum_s(seconds, len(group))
            for (stage, group), seconds in zip(owned, store_s)
        ),
        store_s=store_s,
        accumulate_s=tuple(_ADDING_FRESH * seconds for seconds in store_s),
        loss_s=loss_s,
        start_s=STEP_S,
        split=SPLIT,
        hosts=tuple(device.host for device in cluster.devices),
        n_cores=cluster.n_cores,
        beside=BESIDE,
        sharing=SHARING,
        source=f"{cluster.inside.source}; the runtime's own work: benchmarks/overhead.py",
    )


def pack_bytes_per_s(cluster: Cluster) -> float:
    """Return how fast CPU workers pack what they send."""
    return _PACK_BYTES_PER_S if _in_shared_memory(cluster) else _SOCKET_PACK_BYTES_PER_S


def _in_shared_memory(cluster: Cluster) -> bool:
    return cluster.inside == cpu_link()


def _trained(stage: StageRecord) -> float:
    """Return the bytes of the weights that an optimizer changes: state has copies of these."""
    return (stage.memory_bytes - stage.held_bytes - stage.parameter_bytes) / (STATE_COPIES - 1)


def _record(cluster: Cluster, source: int, target: int) -> LinkRecord:
    assert cluster.groups is not None
    link = cluster.slowest_link([*cluster.groups[source], *cluster.groups[target]])
    if set(cluster.groups[source]) == set(cluster.groups[target]):
        link = Link(0.0, 2.0**62, "the same worker")
    return LinkRecord(source, target, link.latency_s, link.bytes_per_s)


def _bandwidth(cluster: Cluster, group: Sequence[int]) -> float:
    return min(cluster.devices[index].kind.bytes_per_s for index in group)


def _spans_hosts(cluster: Cluster, group: Sequence[int]) -> bool:
    return len({cluster.devices[index].host for index in group}) > 1


def _sum_s(store_s: float, n_replicas: int) -> float:
    """Price summing gradients in memory that replicas share: each adds its part of all the others' to the first's."""
    return REDUCE_S + (n_replicas - 1) / n_replicas * store_s if n_replicas > 1 else 0.0


def _all_reduce_s(stage: StageRecord, cluster: Cluster, group: Sequence[int]) -> float:
    """Price a ring all-reduce of the stage's gradients.

    Patarasuk and Yuan, 2009 (https://doi.org/10.1016/j.jpdc.2008.09.002).
    """
    n = len(group)
    if n == 1:
        return 0.0
    link = cluster.slowest_link(group)
    return 2 * (n - 1) / n * stage.parameter_bytes / link.bytes_per_s + 2 * (n - 1) * link.latency_s
