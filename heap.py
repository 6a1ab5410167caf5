"""The C library's heap: what a training step frees stays at hand for the next one."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER = -1
_MOST_BYTES = 32 << 20  # glibc takes no larger threshold for blocks of their own
_LEAST_BYTES = 128 << 10  # glibc's own choice, before it follows what is freed
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def return_freed_memory() -> None:
    """Let glibc give what is freed back at once: larger blocks are mappings of their own, with no holes between them.

    For the first steps of a pipeline, whose blocks are cut otherwise than those of the steps that follow: in a heap
    that keeps what is freed they leave holes that no later step fills (ResNet-50's peak was a fifth higher for it).
    Choices made by environment variables, and other C libraries, are left alone.
    """
    if _is_ours():
        _set(_LEAST_BYTES, _LEAST_BYTES)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in the process instead of giving it back to the system and faulting it in again.

    A training step allocates and frees the same sizes over and over. By default glibc returns the top of its heap, so
    that each step touches fresh pages: 5 to 10 % of the backwards of ResNet-50 and of an MLP on one thread. Choices
    made by environment variables, and other C libraries, are left alone (mallopt(3)).
    """
    if _is_ours():
        _set(_NEVER)


def give_freed_memory_back() -> None:
    """Let the system have what is free now; what is freed later is kept again."""
    if _is_ours():
        _libc().malloc_trim(0)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory for a while, then give it back.

    Afterwards glibc's thresholds are those that it arrives at by itself once a block of 32 MiB was freed.
    """
    if not _is_ours():
        yield
        return
    _set(_NEVER)
    try:
        yield
    finally:
        _set(2 * _MOST_BYTES)
        _libc().malloc_trim(0)


def _is_ours() -> bool:
    return platform.libc_ver()[0] == "glibc" and not any(name in os.environ for name in _CHOSEN)


def _set(trim_threshold: int, mmap_threshold: int = _MOST_BYTES) -> None:
    _libc().mallopt(_M_TRIM_THRESHOLD, trim_threshold)
    _libc().mallopt(_M_MMAP_THRESHOLD, mmap_threshold)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
