"""A cut with its proof, as plain data."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """A cut into stages with its proof; a stage is called a chunk where a device may hold several.

    Args:
        device_of: the name of the (first) device that each node runs on.
        stage_of: the position in the pipeline of the stage that holds each node: every edge goes forward or stays.
        order: the names of the devices used, in pipeline order; with several chunks per device a name occurs as often.
        stage_devices: per stage, the names of its devices, each of which holds the whole stage.
        replicas: per stage, the number of its devices.
        recompute: per stage, whether it computes its forward again for the backward pass.
        loads_s: per stage, the load as ``solve`` defines it.  Of the stages of one device, the first that holds a node
            of a transfer pays it for all.
        memory_bytes: per stage, the bytes on each of its devices as ``solve`` defines them.
        load_of: per device used, the sum of the loads of its stages.
        max_load: the largest of ``load_of``.
        lower_bound: no cut that meets the constraints has a smaller largest load (proven, up to 1e-9 relative).
        optimal: whether ``lower_bound`` reaches ``max_load``.
        seconds: the time that solving took.
        n_downsets: downsets that the last exact search for one stage per device listed.
    """

    device_of: dict[Hashable, str]
    stage_of: dict[Hashable, int]
    order: tuple[str, ...]
    stage_devices: tuple[tuple[str, ...], ...]
    replicas: tuple[int, ...]
    recompute: tuple[bool, ...]
    loads_s: tuple[float, ...]
    memory_bytes: tuple[float, ...]
    load_of: dict[str, float]
    max_load: float
    lower_bound: float
    optimal: bool
    seconds: float
    n_downsets: int
