"""A thorough measurement of one CPU thread, kept on disk for :func:`stagecut.partitioner.cpu.this_cpu`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress

import torch

from .cluster import DeviceKind
from .cpu import (
    DTYPES,
    best_s,
    calibration_file,
    calibration_key,
    cpu_kind,
    dtype_name,
    kept_calibration,
    this_cpu,
    threads,
)

_SIZES = (256, 512, 1024, 2048)
_BLOCKS_MIB = (64, 128, 256)
_TINY = 8
_CALLS = 200
# Of the seconds: products, copies; what is left goes to tiny ops.
_PRODUCTS, _COPIES = 0.75, 0.2


def calibrate(
    seconds: float = 5.0, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> DeviceKind:
    """Measure one thread of this CPU and keep the result for this processor and torch version.

    Rates are the best of products of square matrices of several sizes, per dtype; a size that would not fit into its
    part of ``seconds`` is left out. Bandwidth is the best of copies of blocks beyond the caches, reads and writes
    together. Overhead is the median over tiny ops. The memory needed is two blocks of 256 MiB.

    Raises:
        ValueError: ``seconds`` is not above zero.
        OSError: the result cannot be written.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    total = len(DTYPES) + 2
    rates: dict[str, float] = {}
    with threads(1):
        for done, dtype in enumerate(DTYPES):
            progress("calibrating the CPU", done, total)
            rates[dtype_name(dtype)] = _rate(dtype, seconds * _PRODUCTS / len(DTYPES))
        progress("calibrating the CPU", total - 2, total)
        bytes_per_s = _bandwidth(seconds * _COPIES)
        progress("calibrating the CPU", total - 1, total)
        overhead_s = _overhead(seconds * (1 - _PRODUCTS - _COPIES))
    progress("calibrating the CPU", total, total)
    _keep(cpu_kind(rates, bytes_per_s, overhead_s, ""), seconds)
    this_cpu.cache_clear()
    kept = kept_calibration()
    assert kept is not None
    return kept


def _rate(dtype: torch.dtype, budget_s: float) -> float:
    best = 0.0
    for size in _SIZES:
        part = budget_s / len(_SIZES)
        # A size takes a first run and a timed one at least; bfloat16 is much slower than float32 on some processors.
        if best and 2 * 2 * size**3 / best > max(part, budget_s / 2):
            break
        matrix = torch.ones(size, size, dtype=dtype)
        best = max(best, 2 * size**3 / best_s(lambda m=matrix: m @ m, 1000, part))  # type: ignore[misc]
    return best


def _bandwidth(budget_s: float) -> float:
    best = 0.0
    for mib in _BLOCKS_MIB:
        block, target = torch.ones(mib << 18), torch.empty(mib << 18)
        copy_s = best_s(lambda b=block, t=target: t.copy_(b), 1000, budget_s / len(_BLOCKS_MIB))  # type: ignore[misc]
        best = max(best, 2 * (mib << 20) / copy_s)
    return best


def _overhead(budget_s: float) -> float:
    tiny = torch.ones(_TINY, _TINY)
    ops: tuple[Callable[[], object], ...] = (lambda: tiny + tiny, lambda: tiny * 2, tiny.relu, tiny.sum, tiny.clone)

    def repeated(op: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(_CALLS):
                op()

        return run

    seconds = sorted(best_s(repeated(op), 1000, budget_s / len(ops)) / _CALLS for op in ops)
    return seconds[len(seconds) // 2]


def _keep(kind: DeviceKind, seconds: float) -> None:
    """Add the calibration to the file, in one step; a file that cannot be read is replaced."""
    path = calibration_file()
    known: dict[str, object] = {}
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text())
        known = found if isinstance(found, dict) else {}
    known[calibration_key()] = {
        "flops_per_s": dict(kind.flops_per_s),
        "bytes_per_s": kind.bytes_per_s,
        "kernel_overhead_s": kind.kernel_overhead_s,
        "seconds": seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(known, indent=1))
    os.replace(temporary, path)
