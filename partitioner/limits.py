"""What the devices of stages can hold, and what does not go into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import InfeasibleError
from .cluster import Cluster
from .explain import describe_groups
from .plan import StageRecord
from .wording import count


def limits_of(cluster: Cluster) -> list[float]:
    """Return the bytes that each stage's devices have."""
    assert cluster.groups is not None
    return [min(cluster.devices[index].kind.memory_bytes for index in group) for group in cluster.groups]


def shares_of(cluster: Cluster) -> list[float]:
    """Return the bytes that each stage may have, if stages of one device have equal parts of it."""
    return [limit / n for limit, n in zip(limits_of(cluster), stages_beside(cluster))]


def stages_beside(cluster: Cluster) -> list[int]:
    """Count, for each stage, the stages that its devices have, itself included."""
    assert cluster.groups is not None
    return [cluster.groups.count(group) for group in cluster.groups]


def over(stages: Sequence[StageRecord], limits: Sequence[float]) -> list[float]:
    """Return how many bytes the device of each stage is over its limit, with all stages that it has."""
    return [stage.device_bytes - limit for stage, limit in zip(stages, limits)]


def with_more_memory(cluster: Cluster, extra: float) -> Cluster:
    """Give every device so many bytes more."""
    kinds = {kind: replace(kind, memory_bytes=kind.memory_bytes + extra) for kind in cluster.kinds}
    return replace(cluster, devices=tuple(replace(device, kind=kinds[device.kind]) for device in cluster.devices))


def check_state(state_bytes: float, cluster: Cluster) -> None:
    """Refuse at once stages that cannot even hold the parameters.

    Raises:
        InfeasibleError: parameters, gradients and optimizer state alone need more than all stages have.
    """
    limits = limits_of(cluster)
    in_all = sum(shares_of(cluster))
    if state_bytes > in_all:
        raise InfeasibleError(
            f"parameters with gradients and optimizer state need {state_bytes:,.0f} bytes, and "
            f"{count(cluster.n_stages, 'stage')} can hold {in_all:,.0f}",
            hint=f"use at least {-(-state_bytes // max(limits)):,.0f} stages of such devices",
        )


def of_shape(cluster: Cluster, error: InfeasibleError) -> InfeasibleError:
    """Say of which stages an error speaks."""
    assert cluster.groups is not None
    shape = describe_groups([len(group) for group in cluster.groups], cluster.n_devices)
    return InfeasibleError(f"{shape}: {error.message}", hint=error.hint)
