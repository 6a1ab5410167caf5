"""This machine's CPU as a device: how fast one thread is, and what messages between CPU workers cost."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .cluster import DeviceKind, Link

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_QUICK_SIZE = 384
_QUICK_FLOATS = 1 << 21
_PACE_RUNS = 120
_FILE = "cpu-1.json"


@functools.cache
def this_cpu() -> DeviceKind:
    """Return what :func:`stagecut.partitioner.calibrate.calibrate` kept of this CPU, or measure one thread of it.

    The measurement takes about a tenth of a second: a matrix product per dtype, a copy, a tiny op.
    """
    return kept_calibration() or _quick()


@functools.cache
def pace() -> tuple[float, float]:
    """Return how fast this machine is now, as FLOP/s and bytes/s of one thread, measured once a process.

    The best of a tenth of a second, so that a stall of some milliseconds is not taken for a slower machine.
    """
    with threads(1):
        return _matrix_rate(torch.float32, _PACE_RUNS), _copy_rate(_PACE_RUNS // 8)


def _quick() -> DeviceKind:
    with threads(1):
        rates = {}
        for dtype in DTYPES:
            rates[dtype_name(dtype)] = _matrix_rate(dtype)
        bandwidth = _copy_rate()
        tiny = torch.ones(8)
        overhead = best_s(lambda: tiny + tiny)
    return cpu_kind(rates, bandwidth, overhead, "measured on this CPU, one thread, a tenth of a second")


def _matrix_rate(dtype: torch.dtype, repeats: int = 5) -> float:
    """Return the FLOP/s of a matrix product."""
    matrix = torch.ones(_QUICK_SIZE, _QUICK_SIZE, dtype=dtype)
    return 2 * _QUICK_SIZE**3 / best_s(lambda: matrix @ matrix, repeats)


def _copy_rate(repeats: int = 5) -> float:
    """Return the bytes/s of a copy, read and written."""
    block, target = torch.ones(_QUICK_FLOATS), torch.empty(_QUICK_FLOATS)
    return 2 * block.numel() * 4 / best_s(lambda: target.copy_(block), repeats)


def cpu_kind(rates: Mapping[str, float], bytes_per_s: float, overhead_s: float, source: str) -> DeviceKind:
    """Describe one thread of a CPU."""
    return DeviceKind("cpu", dict(rates), bytes_per_s, overhead_s, math.inf, source)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as kinds of devices list it."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads while the body runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best_s(function: Callable[[], object], repeats: int = 5, budget_s: float = math.inf) -> float:
    """Return the seconds of the fastest of some runs after a first one: ``repeats``, or one once ``budget_s`` is up."""
    end = time.perf_counter() + budget_s
    function()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            break
    return best


def calibration_file() -> Path:
    """Return where calibrations are kept: next to the measured costs."""
    return cache_folder() / _FILE


def calibration_key() -> str:
    """Name what a calibration holds for."""
    return f"{processor_name()}/{torch.__version__}"


def kept_calibration() -> DeviceKind | None:
    """Return the calibration of this processor and torch version; None if there is none that can be read."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        found = json.loads(calibration_file().read_text())[calibration_key()]
        rates = {str(name): float(rate) for name, rate in found["flops_per_s"].items()}
        bytes_per_s, overhead_s = float(found["bytes_per_s"]), float(found["kernel_overhead_s"])
        if rates and all(0 < number < math.inf for number in (*rates.values(), bytes_per_s, overhead_s)):
            source = f"calibrated on this CPU, one thread, {found['seconds']:g} s"
            return cpu_kind(rates, bytes_per_s, overhead_s, source)
    return None


def processor_name() -> str:
    """Return what the system calls the processor."""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    return "unknown"


def cpu_link() -> Link:
    """Describe messages between local CPU workers: in shared memory, from waking up to reading what is cold."""
    return Link(100e-6, 8e9, "shared memory, 100 us as benchmarks/overhead.py measures, 8 GB/s to read what is cold")


def cpu_socket_link() -> Link:
    """Describe messages between CPU ranks that may be on several machines: gloo, packing and unpacking included."""
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


def free_memory_bytes() -> int:
    """Return the bytes that new processes could have without swapping; all of the machine's where it does not say."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return machine_memory_bytes()


def cache_folder() -> Path:
    """Return where measured costs and the calibration are kept: ``$STAGECUT_CACHE`` or ``~/.cache/stagecut``."""
    return Path(os.environ.get("STAGECUT_CACHE") or Path.home() / ".cache" / "stagecut")
