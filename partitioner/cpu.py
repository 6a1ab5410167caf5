"""This machine's CPU as a device: how fast one thread is, and what messages between CPU workers cost."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch

from .cluster import DeviceKind, Link


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
    return DeviceKind("cpu", {"float32": flops}, bandwidth, overhead, float("inf"), "measured on this CPU, one thread")


def _best(function: Callable[[], object], repeats: int = 7) -> float:
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


def cpu_network() -> Link:
    """Describe messages between CPU workers of two machines."""
    return Link(200e-6, 1e9, "assumed: gloo over 10 Gb/s Ethernet, 200 us, 1 GB/s")


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory_bytes() -> int:
    """Return the bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
