"""The timeline that a plan was chosen for, simulated again from the plan alone."""

from __future__ import annotations

from ..partitioner.cluster import Cluster, DeviceKind, cpu_link, describe
from ..partitioner.plan import Plan
from ..partitioner.predict import predict
from ..runtime.program import Timeline


def timeline_of(plan: Plan) -> Timeline:
    """Simulate one step of ``plan``; equal plans give equal timelines on every machine."""
    return predict(plan, _cluster_of(plan))


def _cluster_of(plan: Plan) -> Cluster:
    """Rebuild the devices without asking this machine for any; the simulator reads their kind's name and their link."""
    on_cpu = {name.split(":")[0] for name in plan.devices} == {"cpu"}
    link = cpu_link() if on_cpu else describe("sim:1xA100").link
    memory_bytes = min(stage.memory_limit_bytes for stage in plan.stages)
    kind = DeviceKind("cpu" if on_cpu else "accelerator", 0.0, 0.0, 0.0, memory_bytes, "the plan")
    return Cluster(tuple(stage.devices for stage in plan.stages), kind, link, simulated=True)
