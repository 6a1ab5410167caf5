"""Clusters in a TOML file: kinds of devices, hosts, and the links between them (docs/clusters.md has the format)."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import DeviceError
from ..records import finite
from .cluster import Cluster, DeviceKind, Link, slowest
from .cluster_spec import Host, check_count, cluster_of_hosts, is_known
from .devices import GIB, KERNEL_OVERHEAD_S, NAMES, KnownDevice, known_device

SUFFIX = ".toml"
# Nothing is known of the links of a kind that the file describes: where messages travel, it has to say what they cost.
_UNKNOWN = Link(0.0, math.inf, "not described")


def cluster_of_file(path: str) -> Cluster:
    """Describe the devices that a TOML file lists; they are planned for, and need not exist.

    Raises:
        DeviceError: the file cannot be read, or something in it is missing, unknown or of another form.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"{path} cannot be read: {error}") from error
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # integers of thousands of digits and deep nesting too
        raise DeviceError(f"{path} is not TOML: {error}") from error
    return _cluster(_Table(path, "", found))


class _Table:
    """A table of the file: gives out its entries, and refuses what nobody asked for."""

    def __init__(self, file: str, where: str, entries: Mapping[str, Any]) -> None:
        self.file, self.where, self.entries = file, where, entries

    def name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def wrong(self, key: str, expected: str) -> DeviceError:
        found = f"is {self.entries[key]!r}" if key in self.entries else "is missing"
        return DeviceError(f"{self.file}: {self.name(key)} {found}; expected {expected}")

    def only(self, *keys: str) -> None:
        """Refuse other keys than ``keys``."""
        for key in self.entries:
            if key not in keys:
                raise DeviceError(f"{self.file}: {self.name(key)} is not known; expected one of {', '.join(keys)}")

    def number(self, key: str, expected: str, default: float | None = None, *, zero: bool = False) -> float:
        """Return a finite number above zero, or zero where that makes sense."""
        value = finite(self.entries.get(key, default))
        if value is None:
            raise self.wrong(key, expected)
        if value < 0 or (value == 0 and not zero):
            raise self.wrong(key, expected)
        return value

    def text(self, key: str, default: str) -> str:
        value = self.entries.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def table(self, key: str, expected: str = "a table") -> _Table | None:
        """Return the table at ``key``, None if there is none."""
        value = self.entries.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, expected)
        return _Table(self.file, self.name(key), value)


def _cluster(file: _Table) -> Cluster:
    file.only("kinds", "hosts", "between")
    kinds: dict[str, DeviceKind] = {}
    named = file.table("kinds")
    for name in named.entries if named is not None else ():
        table = named.table(name) if named is not None else None
        if table is None or not name:
            raise file.wrong("kinds", "a table for each kind")
        kinds[name] = _kind(table, name)
    hosts = file.entries.get("hosts")
    if not isinstance(hosts, list) or not hosts or not all(isinstance(host, dict) for host in hosts):
        raise file.wrong("hosts", "one [[hosts]] table or more")
    between = file.table("between")
    network = None if between is None else _link(between)
    made: list[Host] = []
    for number, entries in enumerate(hosts):
        made += _hosts(_Table(file.file, f"hosts[{number}]", entries), kinds)
    if network is None and len(made) > 1 and any(host.between == _UNKNOWN for host in made):
        raise file.wrong("between", "the link between hosts: { bytes_per_s = 25e9, latency_s = 20e-6 }")
    return cluster_of_hosts(made, network)


def _kind(table: _Table, name: str) -> DeviceKind:
    table.only("flops_per_s", "bytes_per_s", "memory_gib", "kernel_overhead_s", "source")
    if is_known(name):
        raise DeviceError(f"{table.file}: {table.where} is a device of the table already; give it another name")
    expected = "a table of rates by dtype: { float32 = 20e12, bfloat16 = 150e12 }"
    rates = table.table("flops_per_s", expected)
    if rates is None or not rates.entries:
        raise table.wrong("flops_per_s", expected)
    for dtype in rates.entries:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise DeviceError(f"{table.file}: {rates.name(dtype)} is no dtype of torch; expected float32, bfloat16, …")
    return DeviceKind(
        name,
        {dtype: rates.number(dtype, "operations per second, above 0") for dtype in rates.entries},
        table.number("bytes_per_s", "bytes of memory traffic per second, above 0"),
        table.number("kernel_overhead_s", "seconds, 0 or more", KERNEL_OVERHEAD_S, zero=True),
        _memory_bytes(table),
        table.text("source", f"{table.file}, {table.where}"),
    )


def _memory_bytes(table: _Table) -> float:
    expected = "GiB of memory, above 0"
    n_bytes = table.number("memory_gib", expected) * GIB
    if not math.isfinite(n_bytes):
        raise table.wrong("memory_gib", expected)
    return n_bytes


def _hosts(table: _Table, kinds: Mapping[str, DeviceKind]) -> list[Host]:
    table.only("devices", "count", "link")
    devices = table.table("devices", "a table of counts by kind: { A100-80GB = 8 }")
    if devices is None or not devices.entries:
        raise table.wrong("devices", "a table of counts by kind: { A100-80GB = 8 }")
    mine: list[KnownDevice] = []
    for name in devices.entries:
        count = _count(devices, name)
        if name in kinds:
            known = KnownDevice(kinds[name], _UNKNOWN, _UNKNOWN)
        elif is_known(name):
            known = known_device(name)
        else:
            raise DeviceError(
                f"{table.file}: {devices.name(name)} is no known device and no table of kinds; "
                f"expected one of {', '.join([*kinds, *NAMES])}"
            )
        check_count(f"{table.file}: {table.where}", len(mine) + count)
        mine += [known] * count
    link = table.table("link")
    if link is None and len(mine) > 1 and any(known.inside == _UNKNOWN for known in mine):
        raise table.wrong("link", "the link between its devices: { bytes_per_s = 200e9, latency_s = 10e-6 }")
    count = _count(table, "count") if "count" in table.entries else 1
    check_count(f"{table.file}: {table.where}", len(mine) * count)
    inside = slowest(known.inside for known in mine) if link is None else _link(link)
    return [Host(tuple(known.kind for known in mine), inside, slowest(known.between for known in mine))] * count


def _count(table: _Table, key: str) -> int:
    value = table.entries[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise table.wrong(key, "a whole number, 1 or more")
    return value


def _link(table: _Table) -> Link:
    table.only("bytes_per_s", "latency_s", "source")
    return Link(
        table.number("latency_s", "seconds, 0 or more", zero=True),
        table.number("bytes_per_s", "bytes per second in one direction, above 0"),
        table.text("source", f"{table.file}, {table.where}"),
    )
