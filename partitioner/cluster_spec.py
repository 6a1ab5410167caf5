"""Clusters in one line: ``sim:4x8xA100-80GB`` is four hosts of eight, ``sim:8xA100+8xV100-32GB`` a host of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DeviceError
from .cluster import Cluster, Device, DeviceKind, Link, slowest
from .devices import NAMES, known_device

PREFIX = "sim:"
_PART = re.compile(r"(?:(?P<hosts>\d+)x)?(?P<count>\d+)x(?P<kind>[A-Za-z][A-Za-z0-9]*?)(?:-(?P<gib>\d{1,6})GB)?$")
_KINDS = frozenset(name.partition("-")[0] for name in NAMES)
_MOST_DEVICES = 100_000  # what a mistyped count asks for would not fit into memory
_HINT = "devices='sim:8xH100-80GB', 'sim:4x8xA100-80GB' for four hosts, 'sim:8xA100+8xV100-32GB' for a host of each"


@dataclass(frozen=True)
class Host:
    """A machine: its devices, the link between them, and each device's share of the network to other hosts."""

    kinds: tuple[DeviceKind, ...]
    inside: Link
    between: Link


def cluster_of_spec(text: str) -> Cluster:
    """Describe the devices that ``text`` names: parts ``[HOSTSx]COUNTxKIND[-MEMORYGB]`` joined by ``+``.

    Raises:
        DeviceError: ``text`` has another form, counts nothing, or names a kind that is not known.
    """
    hosts: list[Host] = []
    for part in text.removeprefix(PREFIX).split("+"):
        match = _PART.match(part.strip())
        if match is None:
            raise DeviceError(
                f"{text!r} describes no cluster: {part!r} is not of the form [HOSTSx]COUNTxKIND[-MEMORYGB]", hint=_HINT
            )
        n_hosts, count = _whole(match["hosts"] or "1"), _whole(match["count"])
        check_count(text, n_hosts * count + sum(len(host.kinds) for host in hosts))
        if n_hosts < 1 or count < 1:
            raise DeviceError(f"{text!r} describes no cluster: {part!r} has no devices", hint=_HINT)
        if not is_known(match["kind"]):
            raise DeviceError(f"{text!r} describes no cluster; known kinds: {', '.join(NAMES)}", hint=_HINT)
        known = known_device(match["kind"], int(match["gib"]) if match["gib"] else None)
        hosts += [Host((known.kind,) * count, known.inside, known.between)] * n_hosts
    return cluster_of_hosts(hosts)


def check_count(where: str, n_devices: int) -> None:
    """Look that a description is of a number of devices that can be planned for.

    Raises:
        DeviceError: it is of more.
    """
    if n_devices > _MOST_DEVICES:
        raise DeviceError(f"{where} describes more than {_MOST_DEVICES:,} devices")


def _whole(digits: str) -> int:
    return int(digits) if len(digits) <= 9 else _MOST_DEVICES + 1


def is_known(kind: str) -> bool:
    """Say whether the table of devices has ``kind``, whatever its memory."""
    return kind.upper().partition("-")[0] in _KINDS


def cluster_of_hosts(hosts: Sequence[Host], between: Link | None = None) -> Cluster:
    """Join hosts to a cluster that is only planned for; the slowest host's network if ``between`` is not given.

    Devices are named by kind and counted within their host: ``A100:0``, or ``host1/A100:0`` where there are several.
    """
    devices: list[Device] = []
    for number, host in enumerate(hosts):
        counted: Counter[str] = Counter()
        for kind in host.kinds:
            plain = kind.name.partition("-")[0] if is_known(kind.name) else kind.name
            name = f"{plain}:{counted[plain]}"
            devices.append(Device(f"host{number}/{name}" if len(hosts) > 1 else name, kind, number))
            counted[plain] += 1
    inside = slowest([host.inside for host in hosts])
    differ = any(host.inside != inside for host in hosts)
    return Cluster(
        devices=tuple(devices),
        groups=None,
        inside=inside,
        between=slowest([host.between for host in hosts]) if between is None else between,
        simulated=True,
        host_links=tuple(host.inside for host in hosts) if differ else (),
    )
