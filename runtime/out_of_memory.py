"""Memory that ran out: told from other errors, and set against what the plan expected."""

from __future__ import annotations

import torch

from ..errors import FailureSite, OutOfMemoryError

_MIB = 2**20
# The CPU allocator of torch has no exception of its own.
_WORDS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def set_against(used_bytes: int, planned_bytes: int) -> str:
    """Say how much a worker's process had, and how much of it the plan knows of."""
    return (
        f"{used_bytes / _MIB:.0f} MiB, where the plan is for {planned_bytes / _MIB:.0f} MiB beside what any process "
        "has that imports torch"
    )


def explained(error: BaseException, site: FailureSite, planned_bytes: int, used_bytes: int) -> BaseException:
    """Return an error that says what was planned, what was used, and what needs less; ``error`` is its cause."""
    said = str(error).strip().splitlines()
    told = OutOfMemoryError(
        f"memory ran out in {site}: {said[0] if said else type(error).__name__}; at its fullest the process had "
        f"{set_against(used_bytes, planned_bytes)}",
        hint=f"stagecut.compile(..., memory_bytes={max(planned_bytes // 2, 1)}) plans for half of it (more "
        "microbatches, recomputed activations, other cuts), or says that nothing fits; or give the step fewer rows",
        planned_bytes=planned_bytes,
        used_bytes=used_bytes,
    )
    told.__cause__ = error
    told.stagecut = site  # type: ignore[attr-defined]
    return told
