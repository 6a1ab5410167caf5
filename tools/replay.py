"""The timeline that a plan was chosen for, simulated again from the plan alone."""

from __future__ import annotations

from ..partitioner.cluster import Cluster, Device, DeviceKind, slowest
from ..partitioner.cluster_spec import is_known
from ..partitioner.cpu import cpu_link, cpu_network
from ..partitioner.devices import KnownDevice, known_device
from ..partitioner.plan import Plan
from ..partitioner.predict import predict
from ..runtime.program import Timeline


def timeline_of(plan: Plan) -> Timeline:
    """Simulate one step of ``plan``; equal plans give equal timelines on every machine."""
    return predict(plan, _cluster_of(plan))


def _cluster_of(plan: Plan) -> Cluster:
    """Rebuild the devices without asking this machine for any; the simulator reads kinds' names and links.

    Links are those of the kinds that devices are named after; ``cuda:0``, and kinds of a file, are taken for an A100.
    """
    split = [name.rpartition("/") for name in plan.devices]  # "host1/A100:0", or "A100:0" where there is one host
    known = [_known(device.split(":")[0]) for _, _, device in split]
    hosts = list(dict.fromkeys(host for host, _, _ in split))
    inside = tuple(slowest(k.inside for k, (host, _, _) in zip(known, split) if host == own) for own in hosts)
    return Cluster(
        devices=tuple(
            Device(name, k.kind, hosts.index(host)) for name, k, (host, _, _) in zip(plan.devices, known, split)
        ),
        groups=None,
        inside=slowest(inside),
        between=slowest(k.between for k in known),
        simulated=True,
        host_links=inside,
    )


def _known(kind: str) -> KnownDevice:
    if kind == "cpu":
        return KnownDevice(DeviceKind("cpu", {}, 0.0, 0.0, 0.0, "the plan"), cpu_link(), cpu_network())
    return known_device(kind if is_known(kind) else "A100")
