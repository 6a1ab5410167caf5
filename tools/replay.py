"""The timeline that a plan was chosen for, simulated again from the plan alone."""

from __future__ import annotations

from ..partitioner.cluster import Cluster, Device, DeviceKind, slowest
from ..partitioner.cluster_spec import is_known
from ..partitioner.cpu import cpu_link, cpu_network
from ..partitioner.devices import known_device
from ..partitioner.plan import Plan
from ..partitioner.predict import predict
from ..runtime.program import Timeline


def timeline_of(plan: Plan) -> Timeline:
    """Simulate one step of ``plan``; equal plans give equal timelines on every machine."""
    return predict(plan, _cluster_of(plan))


def _cluster_of(plan: Plan) -> Cluster:
    """Rebuild the devices without asking this machine for any; the simulator reads kinds' names and links.

    Links are those of the kinds that the devices are named after; ``cuda:0`` is taken for an A100.
    """
    types = list(dict.fromkeys(name.rpartition("/")[2].split(":")[0] for name in plan.devices))
    known = [known_device(name if is_known(name) else "A100") for name in types if name != "cpu"]
    inside = slowest([*(device.inside for device in known), *([cpu_link()] if "cpu" in types else [])])
    between = slowest([*(device.between for device in known), *([cpu_network()] if "cpu" in types else [])])
    hosts = list(dict.fromkeys(_host(name) for name in plan.devices))
    memory_bytes = min(stage.memory_limit_bytes for stage in plan.stages)
    kind = DeviceKind("cpu" if "cpu" in types else "accelerator", {}, 0.0, 0.0, memory_bytes, "the plan")
    devices = tuple(Device(name, kind, hosts.index(_host(name))) for name in plan.devices)
    return Cluster(devices, None, inside, between, simulated=True)


def _host(name: str) -> str:
    """Return the host of a device of a cluster that is only planned for: ``host1`` of ``host1/A100:0``."""
    return name.rpartition("/")[0]
