"""A process that is killed while it saves: what can be loaded is whole, and of one step."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_kills_during_saves_leave_whole_checkpoints(repository: Path) -> None:
    script = str(repository / "benchmarks" / "save_kills.py")
    command = [sys.executable, script, "--kills", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    found = re.fullmatch(r"40 kills, (\d+) .* written, (\d+) steps saved: (\d+) bad loads\n", done.stdout)
    assert found is not None, done.stdout
    unfinished, saved, bad = map(int, found.groups())
    assert unfinished > 5
    assert saved > 5
    assert bad == 0
