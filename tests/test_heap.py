"""A worker gives back what its first steps free and keeps what later ones do; a process that measures gives it back."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stagecut

GLIBC = platform.libc_ver()[0] == "glibc"
PROGRAM = """
import ctypes, resource, torch
from stagecut.heap import freed_memory_kept, keep_freed_memory, return_freed_memory

def own_blocks():
    ctypes.CDLL(None).mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: what is freed goes back at once

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    blocks = [torch.ones(1 << 20) for _ in range(16)]  # 64 MiB in blocks of 4 MiB
    del blocks

{before}
for _ in range(3):
    work()
start = faults()
for _ in range(4):
    work()
print(faults() - start)
{after}
"""


def faults_of(before: str, after: str = "", **environment: str) -> list[int]:
    program = PROGRAM.format(before=before, after=after)
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", program], env={**known, **environment}, capture_output=True, text=True, check=True
    )
    return [int(line) for line in run.stdout.split()]


pytestmark = pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")


def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    (plain,) = faults_of("own_blocks()")
    (kept,) = faults_of("own_blocks(); keep_freed_memory()")
    pages = 4 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert plain > pages / 2
    assert kept < pages / 100


def test_memory_that_is_returned_is_faulted_in_again() -> None:
    (returned,) = faults_of("keep_freed_memory(); return_freed_memory()")
    assert returned > 4 * (64 << 20) // os.sysconf("SC_PAGE_SIZE") / 2


def test_the_choice_of_the_environment_stands() -> None:
    (chosen,) = faults_of("own_blocks(); keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="131072")
    (kept,) = faults_of("own_blocks(); keep_freed_memory()")
    assert chosen > 10 * max(kept, 1)
    keeps = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    (chosen,) = faults_of("return_freed_memory()", **keeps)
    (returned,) = faults_of("return_freed_memory()")
    assert 10 * max(chosen, 1) < returned


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_worker_keeps_what_its_steps_free_once_they_are_recorded(schedule: str) -> None:
    """The first steps leave no holes in its heap, and the later ones fault nothing in."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    x = torch.randn(1 << 15, 64)  # 4 MiB a value and microbatch
    wishes = {"loss_fn": nn.functional.mse_loss, "costs": "analytic", "microbatches": 2, "schedule": schedule}
    for _ in range(2):  # the second on the workers of the first
        with stagecut.compile(copy.deepcopy(model), [["cpu"], ["cpu"]], **wishes) as pm:
            pm.prepare(x)
            pids = [worker.pid for worker in pm.stats().workers]
            pages = (8 << 20) // os.sysconf("SC_PAGE_SIZE")  # of one value of a step
            each: list[int] = []
            while len(each) < 60 and not (len(each) > 3 and each[-1] < pages / 10):
                before = _faults_of(pids)
                pm.step(x, target=x)
                each.append(_faults_of(pids) - before)
            assert min(each[:3]) > 2 * pages, each
            assert each[-1] < pages / 10, each  # not at once: a heap grows when its worker waits longer than before


def _faults_of(pids: list[int]) -> int:
    """Count the pages that processes have asked for: field 10 of proc_pid_stat(5), after a name in parentheses."""
    lines = [Path(f"/proc/{pid}/stat").read_text() for pid in pids]
    return sum(int(line.rpartition(")")[2].split()[7]) for line in lines)


def test_after_measuring_the_memory_is_given_back() -> None:
    resident = """
from pathlib import Path
def mib():
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith('VmRSS'))) // 1024
context = freed_memory_kept(); context.__enter__(); before = mib(); work(); during = mib()
context.__exit__(None, None, None); print(during - before); print(mib() - before)
"""
    _, during, after = faults_of("own_blocks()", resident)
    assert during > 50
    assert after < 16


def test_when_a_stage_is_recorded_what_was_free_before_goes_back() -> None:
    recording = """
from pathlib import Path
import stagecut
from torch import nn

def mib():
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith('VmRSS'))) // 1024

def step(schedule):
    wishes = dict(microbatches=2, launch='inline', costs='analytic', loss_fn=nn.functional.mse_loss, schedule=schedule)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    with stagecut.compile(model, [['cpu'], ['cpu']], **wishes) as pm:
        pm.prepare(torch.ones(4, 4))
        blocks = [torch.ones(1 << 20) for _ in range(64)]  # 256 MiB
        del blocks
        before = mib()
        pm.step(torch.ones(4, 4), target=torch.ones(4, 4))
        print(before - mib())

step('zb-h1')  # imports what records
step('1f1b')
step('zb-h1')
"""
    _, _, by_autograd, recorded = faults_of("keep_freed_memory()", recording)
    assert by_autograd < 16
    assert recorded > 200
