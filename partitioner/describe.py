"""From what a user writes to a cluster: lists of devices that are there, and descriptions of ones that are not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import DeviceError
from .cluster import Cluster, Device, slowest
from .cluster_file import SUFFIX, cluster_of_file
from .cluster_spec import PREFIX, cluster_of_spec
from .cpu import cpu_link, cpu_network, cpu_socket_link, machine_memory_bytes, this_cpu, usable_cores
from .devices import NAMES, KnownDevice, known_device

Devices = str | int | Sequence[int | str | Sequence[int | str]]
Replicas = int | Sequence[int] | None


def describe(devices: Devices, replicas: Replicas = None, memory_bytes: float | None = None) -> Cluster:
    """Describe the devices to plan for.

    Args:
        devices: a list: ``[0, 1]``, ``["cuda:0", "cpu"]``, nested to fix stages: ``[[0, 1], [2, 3]]``; a description
            of devices that need not exist: ``"sim:4x8xA100-80GB"``; or the path of one: ``"cluster.toml"``. Integers
            are accelerator indices, or CPU workers where there is no accelerator.
        replicas: devices of each stage, in a flat list: one number for all stages, or one each: ``[3, 1]``. None
            leaves stages to the planner, unless devices are nested.
        memory_bytes: memory limit per worker; by default what the device has (for CPU workers an equal share of this
            machine's memory).

    Raises:
        DeviceError: the description is malformed, does not divide into replicas, or names devices that are not there.
    """
    if memory_bytes is not None and not memory_bytes > 0:
        raise DeviceError(f"memory_bytes must be positive, got {memory_bytes}")
    cluster, groups = _read(devices)
    if replicas is not None and groups is not None:
        raise DeviceError("give replicas either by nesting devices or by replicas=, not both")
    if replicas is not None:
        groups = _sized_groups(cluster.n_devices, replicas)
    cluster = cluster.with_groups(groups)
    if memory_bytes is None:
        return cluster
    return replace(cluster, devices=tuple(_with_memory(device, memory_bytes) for device in cluster.devices))


def _read(devices: Devices) -> tuple[Cluster, list[list[int]] | None]:
    """Return the devices, and the stages that nesting fixes."""
    if isinstance(devices, str) and devices.startswith(PREFIX):
        return cluster_of_spec(devices), None
    if isinstance(devices, str) and devices.endswith(SUFFIX):
        return cluster_of_file(devices), None
    listed = _listed(devices)
    nested = _nested(listed)
    cluster = _present(tuple(_name(device) for group in nested for device in group))
    flat = all(isinstance(device, (int, str)) for device in listed)
    return cluster, None if flat else _consecutive([len(group) for group in nested])


def _listed(devices: Devices) -> list[int | str | Sequence[int | str]]:
    if isinstance(devices, int):
        return list(range(devices))
    if isinstance(devices, str):
        return [part.strip() for part in devices.split(",")]
    return list(devices)


def _nested(listed: list[int | str | Sequence[int | str]]) -> list[list[int | str]]:
    groups = [[entry] if isinstance(entry, (int, str)) else list(entry) for entry in listed]
    if not groups:
        raise DeviceError("devices is empty", hint="stagecut.compile(model, devices=[0, 1])")
    if any(not group for group in groups):
        raise DeviceError("a stage has no device")
    return groups


def _sized_groups(n_devices: int, replicas: int | Sequence[int]) -> list[list[int]]:
    """Divide a flat list into stages of the given sizes."""
    if isinstance(replicas, int):
        if replicas < 1 or n_devices % replicas:
            most = max(1, n_devices // max(replicas, 1)) * max(replicas, 1)
            raise DeviceError(
                f"{n_devices} devices do not divide into stages of {replicas} replicas",
                hint=f"devices={list(range(most))}",
            )
        return _consecutive([replicas] * (n_devices // replicas))
    sizes = list(replicas)
    if not sizes or min(sizes) < 1 or sum(sizes) != n_devices:
        raise DeviceError(
            f"replicas={sizes} names {sum(sizes)} devices, and {n_devices} were given; every stage has at least one",
            hint=f"replicas={[1] * n_devices}",
        )
    return _consecutive(sizes)


def _consecutive(sizes: Sequence[int]) -> list[list[int]]:
    ends = [sum(sizes[: s + 1]) for s in range(len(sizes))]
    return [list(range(end - size, end)) for size, end in zip(sizes, ends)]


def _name(device: int | str) -> str:
    if isinstance(device, int) or device.isdigit():
        if not torch.accelerator.is_available():
            return "cpu"
        device = f"{_accelerator_type()}:{int(device)}"
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"{device!r} is no device: {error}") from error
    if parsed.type not in ("cpu", "meta"):
        count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        if (parsed.index or 0) >= count:
            raise DeviceError(f"device {device} is not there; this machine has {count} accelerators")
    return str(parsed)


def _accelerator_type() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return "cuda" if accelerator is None else accelerator.type


def _present(names: tuple[str, ...]) -> Cluster:
    """Describe devices of this machine, each by its own kind."""
    n_cpu = sum(torch.device(name).type == "cpu" for name in names)
    accelerators = {name: _accelerator(name) for name in names if torch.device(name).type != "cpu"}
    devices = []
    for name in names:
        if name in accelerators:
            devices.append(Device(name, accelerators[name].kind))
        else:
            devices.append(Device(name, replace(this_cpu(), memory_bytes=machine_memory_bytes() / n_cpu)))
    inside = slowest([*(known.inside for known in accelerators.values()), *[cpu_link()] * min(n_cpu, 1)])
    between = slowest([*(known.between for known in accelerators.values()), *[cpu_network()] * min(n_cpu, 1)])
    return Cluster(tuple(devices), None, inside, between, n_cores=usable_cores() if n_cpu else None)


def _accelerator(name: str) -> KnownDevice:
    """Find the accelerator ``name`` of this machine in the table; one that is not there is taken for an A100, aloud."""
    device = torch.device(name)
    if device.type != "cuda":
        return _unknown(name, device.type)
    properties = torch.cuda.get_device_properties(device)
    known = _by_product_name(properties.name, properties.total_memory)
    known = _unknown(name, properties.name) if known is None else known
    return replace(known, kind=replace(known.kind, memory_bytes=properties.total_memory))


def _by_product_name(product: str, memory_bytes: int) -> KnownDevice | None:
    """Match what the driver says, ``"NVIDIA A100-SXM4-40GB"`` say: the size of the table next to what is there."""
    # A laptop's chip and a slice of a device have less than the device that they are named after.
    words = re.split(r"[^A-Z0-9]+", product.upper().replace("RTX 4090", "RTX4090"))
    sizes = [key for key in NAMES if key.partition("-")[0] in words and not {"LAPTOP", "MIG"} & set(words)]
    if not sizes:
        return None
    return known_device(min(sizes, key=lambda key: abs(known_device(key).kind.memory_bytes - memory_bytes)))


def _unknown(name: str, product: str) -> KnownDevice:
    warnings.warn(
        f"stagecut: {name} is {product}, whose speed is not known; it is taken for an A100-80GB "
        f"(known are {', '.join(NAMES)})",
        stacklevel=2,
    )
    known = known_device("A100-80GB")
    return replace(known, kind=replace(known.kind, source=f"{product} taken for an A100-80GB; {known.kind.source}"))


def _with_memory(device: Device, memory_bytes: float) -> Device:
    return replace(device, kind=replace(device.kind, memory_bytes=memory_bytes))


def over_sockets(cluster: Cluster) -> Cluster:
    """Return a cluster whose CPU workers exchange messages by sockets: ranks that may be on several machines."""
    return replace(cluster, inside=cpu_socket_link()) if cluster.inside == cpu_link() else cluster
