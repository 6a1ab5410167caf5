"""Tests that need an accelerator: a CUDA device, or with STAGECUT_SIMULATED=1 the simulated one."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

_SIMULATED = os.environ.get("STAGECUT_SIMULATED") == "1"


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip them where there is none."""
    if _SIMULATED or torch.cuda.is_available():
        return
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, or STAGECUT_SIMULATED=1"))


@pytest.fixture(scope="session")
def pair() -> tuple[str, str]:
    """Return two accelerators, or one twice where there is but one."""
    if not _SIMULATED:
        return "cuda:0", f"cuda:{torch.cuda.device_count() - 1}"
    import simulated

    from stagecut.runtime import launch

    simulated.load()
    # A process's autograd knows the devices that were there when it ran for the first time.
    launch._BOOT = launch._BOOT.replace("from {module}", "import simulated; simulated.load(); from {module}")
    return "simulated:0", "simulated:1"


@pytest.fixture(scope="session")
def is_simulated() -> bool:
    """Say whether the accelerators compute as the CPU does, to the bit."""
    return _SIMULATED
