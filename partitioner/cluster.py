"""Clusters: devices with their speeds and memories, and the links between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import DeviceError


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device as a roofline sees it.

    An op takes max(FLOPs / rate of its dtype, bytes / ``bytes_per_s``) plus ``kernel_overhead_s`` per kernel. Two kinds
    of one cluster that differ in speed differ in ``name``.

    Attributes:
        flops_per_s: floating-point operations per second by the dtype's name, ``"bfloat16"`` say.
        bytes_per_s: memory traffic, reads and writes together.
        kernel_overhead_s: seconds that every kernel takes however small it is.
        memory_bytes: what one device holds.
        source: where the numbers come from.
    """

    name: str
    flops_per_s: Mapping[str, float] = field(hash=False)
    bytes_per_s: float
    kernel_overhead_s: float
    memory_bytes: float
    source: str

    def rate(self, dtype: torch.dtype | str) -> float:
        """Return the floating-point operations per second in ``dtype``.

        A dtype without a rate of its own has that of the nearest: bfloat16 and float16 stand for each other, a complex
        dtype counts as its real one, then comes float32, and at last the slowest rate that is known.

        >>> kind = DeviceKind("made up", {"float32": 1e12, "float16": 4e12}, 1e11, 1e-6, 1e9, "an example")
        >>> kind.rate(torch.bfloat16), kind.rate("int8")
        (4000000000000.0, 1000000000000.0)
        """
        name = str(dtype).removeprefix("torch.")
        for known in (name, *_STANDS_FOR.get(name, ()), "float32"):
            if known in self.flops_per_s:
                return self.flops_per_s[known]
        return min(self.flops_per_s.values())


_STANDS_FOR = {
    "bfloat16": ("float16",),
    "float16": ("bfloat16",),
    "complex32": ("float16", "bfloat16"),
    "complex64": ("float32",),
    "complex128": ("float64",),
}


@dataclass(frozen=True)
class Link:
    """What a message costs: seconds = ``latency_s`` + bytes / ``bytes_per_s``; both directions at once cost no more."""

    latency_s: float
    bytes_per_s: float
    source: str

    def seconds(self, n_bytes: float) -> float:
        """Return the seconds that a message of ``n_bytes`` takes."""
        return self.latency_s + n_bytes / self.bytes_per_s


def slowest(links: Iterable[Link]) -> Link:
    """Return the link with the fewest bytes per second; of equal ones that with the longest latency."""
    return min(links, key=lambda link: (link.bytes_per_s, -link.latency_s))


@dataclass(frozen=True)
class Device:
    """One device. ``name`` is what torch calls it where it is there; ``host`` numbers the machine that it is in."""

    name: str
    kind: DeviceKind
    host: int = 0


@dataclass(frozen=True)
class Cluster:
    """Devices in worker order, and what messages between them cost.

    Attributes:
        groups: the devices of each stage, by index, where the user fixed stages; None leaves them to the planner.
        inside, between: the link of two devices of one host, and of two hosts.
        simulated: the devices need not exist, and are only planned for.
        n_cores: CPU cores that the workers of one host share; None where workers do not compute on the CPU.
        host_links: the link inside each host, where hosts differ; ``inside`` holds everywhere if empty.
    """

    devices: tuple[Device, ...]
    groups: tuple[tuple[int, ...], ...] | None
    inside: Link
    between: Link
    simulated: bool = False
    n_cores: int | None = None
    host_links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        if not self.devices:
            raise DeviceError("a cluster has at least one device")
        if self.groups is not None:
            _check_groups(self.groups, len(self.devices))

    @property
    def names(self) -> tuple[str, ...]:
        """List the devices' names in worker order."""
        return tuple(device.name for device in self.devices)

    @property
    def n_devices(self) -> int:
        """Count the devices."""
        return len(self.devices)

    @property
    def kinds(self) -> tuple[DeviceKind, ...]:
        """List the distinct kinds, in the order of the devices."""
        return tuple(dict.fromkeys(device.kind for device in self.devices))

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """List the names of each stage's devices; without groups every device is a stage."""
        groups = self.groups if self.groups is not None else [(index,) for index in range(self.n_devices)]
        return tuple(tuple(self.devices[index].name for index in group) for group in groups)

    @property
    def n_stages(self) -> int:
        """Count the stages that the devices are grouped into."""
        return self.n_devices if self.groups is None else len(self.groups)

    def link(self, a: int, b: int) -> Link:
        """Return the link between two devices, by index."""
        host = self.devices[a].host
        return self._inside(host) if host == self.devices[b].host else self.between

    def slowest_link(self, indices: Iterable[int]) -> Link:
        """Return the slowest link between any two of the devices; of a single device, the link inside its host."""
        counts: dict[int, int] = {}
        for index in indices:
            counts[self.devices[index].host] = counts.get(self.devices[index].host, 0) + 1
        if len(counts) == 1:
            return self._inside(next(iter(counts)))
        return slowest([self.between, *(self._inside(host) for host, count in counts.items() if count > 1)])

    def with_groups(self, groups: Sequence[Sequence[int]] | None) -> Cluster:
        """Return the cluster of the devices that ``groups`` name, with these as its stages.

        Devices come in the order in which groups first name them, so that a stage's workers follow those of the stage
        before; devices that no group names are left out. None frees the stages and keeps all devices.

        Raises:
            DeviceError: a group is empty, or names a device that is not there.
        """
        if groups is None:
            return replace(self, groups=None)
        _check_groups(groups, self.n_devices)
        order = list(dict.fromkeys(index for group in groups for index in group))
        place = {index: position for position, index in enumerate(order)}
        return replace(
            self,
            devices=tuple(self.devices[index] for index in order),
            groups=tuple(tuple(place[index] for index in group) for group in groups),
        )

    def _inside(self, host: int) -> Link:
        return self.host_links[host] if self.host_links else self.inside


def _check_groups(groups: Sequence[Sequence[int]], n_devices: int) -> None:
    if not groups or any(not group for group in groups):
        raise DeviceError("a stage has no device")
    for s, group in enumerate(groups):
        for index in group:
            if not 0 <= index < n_devices:
                raise DeviceError(f"stage {s} names device {index}, and there are {n_devices} devices")
        if len(set(group)) < len(group):
            raise DeviceError(f"stage {s} names a device twice: {tuple(group)}")
