"""The random generators of this process: kept as they were, those of accelerators included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave torch's generators as they were, on the CPU and on every accelerator that this process uses."""
    accelerator = accelerator_in_use()
    if accelerator is None:
        with torch.random.fork_rng(devices=[]):
            yield
        return
    # Named one by one: torch.random.fork_rng() by itself warns on a machine that has several.
    devices = range(torch.accelerator.device_count())
    with torch.random.fork_rng(devices, device_type=accelerator.type):
        yield


def accelerator_in_use() -> torch.device | None:
    """Return the kind of accelerator that this process has set up; None if it has not, or there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    is_initialized = getattr(torch.get_device_module(accelerator), "is_initialized", lambda: True)
    return accelerator if is_initialized() else None
