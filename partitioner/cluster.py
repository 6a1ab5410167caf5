"""Devices and links: what they are called, how fast they are, how much they hold."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import DeviceError

GIB = 1 << 30


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device as a roofline sees it. ``source`` says where the numbers come from.

    An op takes max(FLOPs / ``flops_per_s``, bytes / ``bytes_per_s``) plus ``kernel_overhead_s`` per kernel.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    kernel_overhead_s: float
    memory_bytes: float
    source: str


@dataclass(frozen=True)
class Link:
    """What a message costs: seconds = ``latency_s`` + bytes / ``bytes_per_s``."""

    latency_s: float
    bytes_per_s: float
    source: str

    def seconds(self, n_bytes: float) -> float:
        """Return the seconds that a message of ``n_bytes`` takes."""
        return self.latency_s + n_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Cluster:
    """The devices of a pipeline: per stage, the devices of its replicas.

    ``names`` are torch device names; ``simulated`` clusters are only planned for.
    """

    stages: tuple[tuple[str, ...], ...]
    kind: DeviceKind
    link: Link
    simulated: bool = False

    @property
    def n_stages(self) -> int:
        """Count the stages that the devices are grouped into."""
        return len(self.stages)

    @property
    def names(self) -> tuple[str, ...]:
        """List the devices in worker order: stage by stage, replica by replica."""
        return tuple(name for stage in self.stages for name in stage)


# Dense 16-bit tensor-core rate (half of it is assumed to be reached), memory bandwidth and capacity as in NVIDIA's
# datasheets of the A100 80GB SXM, H100 SXM and H200 SXM.
_ACCELERATORS = {
    "A100": (312e12, 2.039e12, 80 * GIB),
    "H100": (989e12, 3.35e12, 80 * GIB),
    "H200": (989e12, 4.8e12, 141 * GIB),
}
_REACHED = 0.5
_ACCELERATOR_LINK = Link(10e-6, 200e9, "assumed: NVLink, 10 us, 200 GB/s")
_SIMULATED = re.compile(r"sim:(\d+)x([A-Za-z0-9]+?)(?:-(\d+)GB)?$")


def parse_devices(
    devices: str | int | Sequence[int | str | Sequence[int | str]], replicas: int = 1
) -> tuple[tuple[str, ...], ...]:
    """Turn what a user writes into torch device names per stage and replica.

    ``[0, 1]`` is two stages; ``[[0, 1], [2, 3]]`` is two stages of two replicas; ``replicas=2`` groups a flat list.
    Integers are accelerator indices, or CPU workers where there is no accelerator.

    Raises:
        DeviceError: the list is empty, does not divide into replicas, or names a device that is not there.
    """
    if isinstance(devices, int):
        devices = list(range(devices))
    if isinstance(devices, str):
        devices = [part.strip() for part in devices.split(",")]
    if not devices:
        raise DeviceError("devices is empty", hint="stagecut.compile(model, devices=[0, 1])")
    groups: list[list[int | str]]
    if any(not isinstance(device, (int, str)) for device in devices):
        groups = [[d] if isinstance(d, (int, str)) else list(d) for d in devices]
        if replicas != 1:
            raise DeviceError("give replicas either by nesting devices or by replicas=, not both")
    else:
        flat = [device for device in devices if isinstance(device, (int, str))]
        if replicas < 1 or len(flat) % replicas:
            raise DeviceError(
                f"{len(flat)} devices do not divide into stages of {replicas} replicas",
                hint=f"devices={list(range(max(1, len(flat) // max(replicas, 1)) * max(replicas, 1)))}",
            )
        groups = [flat[i : i + replicas] for i in range(0, len(flat), replicas)]
    if any(not group for group in groups):
        raise DeviceError("a stage has no device")
    return tuple(tuple(_name(device) for device in group) for group in groups)


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


def describe(
    devices: str | int | Sequence[int | str | Sequence[int | str]], replicas: int = 1, memory_bytes: float | None = None
) -> Cluster:
    """Describe the devices to plan for; ``"sim:8xH100-80GB"`` describes some that are not there.

    Args:
        memory_bytes: memory limit per worker; by default what the device has (for CPU workers an equal share of this
            machine's memory).

    Raises:
        DeviceError: the description is malformed, or names devices that are not there.
    """
    if isinstance(devices, str) and devices.startswith("sim:"):
        return _simulated(devices, replicas, memory_bytes)
    stages = parse_devices(devices, replicas)
    n_workers = sum(len(stage) for stage in stages)
    types = {torch.device(name).type for stage in stages for name in stage}
    if types == {"cpu"}:
        kind, link = this_cpu(), cpu_link()
        share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / n_workers
    else:
        name = torch.cuda.get_device_name(0) if "cuda" in types else ""
        found = next((key for key in _ACCELERATORS if key in name), "A100")
        kind, link = _accelerator(found, None), _ACCELERATOR_LINK
        share = kind.memory_bytes
    limit = share if memory_bytes is None else memory_bytes
    return Cluster(stages, _with_memory(kind, limit), link)


def _with_memory(kind: DeviceKind, memory_bytes: float) -> DeviceKind:
    return DeviceKind(kind.name, kind.flops_per_s, kind.bytes_per_s, kind.kernel_overhead_s, memory_bytes, kind.source)


def _simulated(text: str, replicas: int, memory_bytes: float | None) -> Cluster:
    match = _SIMULATED.match(text)
    if match is None or match[2].upper() not in _ACCELERATORS:
        raise DeviceError(
            f"{text!r} describes no cluster; known kinds: {', '.join(_ACCELERATORS)}", hint="devices='sim:8xH100-80GB'"
        )
    kind = _accelerator(match[2].upper(), int(match[3]) * GIB if match[3] else None)
    if memory_bytes is not None:
        kind = _with_memory(kind, memory_bytes)
    count = int(match[1])
    if replicas < 1 or count < 1 or count % replicas:
        raise DeviceError(f"{count} devices do not divide into stages of {replicas} replicas")
    names = [f"{match[2].upper()}:{index}" for index in range(count)]
    stages = tuple(tuple(names[i : i + replicas]) for i in range(0, count, replicas))
    return Cluster(stages, kind, _ACCELERATOR_LINK, simulated=True)


def _accelerator(name: str, memory_bytes: float | None) -> DeviceKind:
    flops, bandwidth, memory = _ACCELERATORS[name]
    source = "vendor datasheet, half of the dense 16-bit rate"
    return DeviceKind(name, flops * _REACHED, bandwidth * _REACHED * 1.6, 5e-6, memory_bytes or memory, source)


@functools.cache
def this_cpu() -> DeviceKind:
    """Measure one thread of this CPU in about a tenth of a second: a matrix product, a copy, a tiny op."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix = torch.randn(384, 384)
        flops = 2 * 384**3 / _best(lambda: matrix @ matrix)
        block = torch.randn(1 << 21)
        target = torch.empty_like(block)
        bandwidth = 2 * block.numel() * 4 / _best(lambda: target.copy_(block))
        tiny = torch.randn(8)
        overhead = _best(lambda: tiny + tiny)
    finally:
        torch.set_num_threads(threads)
    return DeviceKind("cpu", flops, bandwidth, overhead, float("inf"), "measured on this CPU, one thread")


def _best(function: object, repeats: int = 7) -> float:
    assert callable(function)
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def cpu_link() -> Link:
    """Describe messages between CPU workers of one machine: gloo over loopback, packing and unpacking included."""
    return Link(150e-6, 1.5e9, "assumed: gloo over loopback, 150 us, 1.5 GB/s")
