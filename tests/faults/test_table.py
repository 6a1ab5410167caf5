"""Rows of the table of faults (benchmarks/faults.py) that no other test brings about."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from fault_rows import checkpoints, processes, steps
from fault_rows.outcome import carried_out

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS = {row.fault: row for row in (*steps.ROWS, *processes.ROWS, *checkpoints.ROWS)}


@pytest.mark.parametrize(
    "fault",
    [
        "wrong shape, dtype, arity, keyword, empty",
        "Ctrl-C twice",
        "two pipelines in a process, two runs",
        "/dev/shm full",
        "disk full while saving",
        "read-only disk",
        "quota",
        "pickle as a plan",
    ],
)
def test_what_happens_is_what_is_promised(fault: str) -> None:
    row = ROWS[fault]
    if row.needs_root and os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system")
    found = carried_out(row)
    assert found.fired, found.seen
    assert found.equal is not False, found.seen
    assert [left for left in found.left if not left.startswith("file /dev/shm")] == []  # others write there too
