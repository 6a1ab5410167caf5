"""Under torchrun every rank hears the same: counts of all, the first value that is not finite, a slow worker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 240


def test_ranks_are_watched_together(repository: Path, tmp_path: Path) -> None:
    support = repository / "tests" / "support"
    path = os.pathsep.join([str(support), *filter(None, [os.environ.get("PYTHONPATH")])])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(support / "torchrun_watch.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "STAGECUT_LOGS": "plan,steps"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is watched") == 2
    for rank in range(2):
        assert re.search(rf"stagecut [\d:.]+ rank {rank} \(pid \d+\) plan: planned Chain: 2 stages", done.stderr)
