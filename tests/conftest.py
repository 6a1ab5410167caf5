"""What every test shares: one thread, a private cost cache, and no process left behind."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, settings

from stagecut.runtime import launch

# No test is timed by hypothesis: machines that run tests stall now and then.
settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests share two cores; torch's thread pools would fight over them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep measured costs of tests out of the user's cache."""
    before = os.environ.get("STAGECUT_CACHE")
    os.environ["STAGECUT_CACHE"] = str(tmp_path_factory.mktemp("costs"))
    yield
    if before is None:
        del os.environ["STAGECUT_CACHE"]
    else:
        os.environ["STAGECUT_CACHE"] = before


def worker_processes() -> list[psutil.Process]:
    """List this process's stagecut workers."""
    return [p for p in psutil.Process().children(recursive=True) if "stagecut" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def no_workers_left() -> Iterator[None]:
    """Fail a module of tests that leaves a worker process behind, but for those that wait for the next pipeline."""
    yield
    waiting = {worker.process.pid for worker in launch._parked} | {template.pid for template in launch._templates}
    assert [process for process in worker_processes() if process.pid not in waiting] == []


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the checkout."""
    return Path(__file__).parents[1]


@pytest.fixture
def warnings_are_errors() -> Iterator[None]:
    """Fail on any warning, and begin from the same random numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        yield
