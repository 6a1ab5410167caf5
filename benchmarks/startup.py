"""Seconds from a script's first line to its first step: the first pipeline of a process, and the ones after it.

    python benchmarks/startup.py

A new process for each round imports torch and stagecut, compiles an MLP for two workers with analytic costs, runs a
step, and does so again with the workers that stayed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

SCRIPT = """
import json, time, warnings
begin = time.perf_counter()
warnings.simplefilter("ignore")
import torch
torch_s = time.perf_counter() - begin
import stagecut
from torch import nn
found = {"import torch": torch_s}
for which in ("first", "second", "third"):
    start = begin if which == "first" else time.perf_counter()
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.GELU())))
    x = torch.randn(64, 256)
    options = {"loss_fn": nn.functional.mse_loss, "stages": 2, "microbatches": 4, "costs": "analytic"}
    with stagecut.compile(model, ["cpu", "cpu"], threads_per_worker=1, **options) as pm:
        pm.step(x, target=x)
        found[f"{which}: until its step was done"] = time.perf_counter() - start
        found[f"{which}: planning"] = pm.startup.plan_s
        found[f"{which}: workers, beside the planning"] = pm.startup.workers_s
        found[f"{which}: the step itself"] = pm.startup.first_call_s
print(json.dumps(found))
"""


def main() -> None:
    """Run some processes and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = []
    for _ in range(parser.parse_args().rounds):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
        rounds.append(json.loads(done.stdout))
    for what in rounds[0]:
        print(f"{what:<40} {statistics.median(found[what] for found in rounds):6.2f} s")


if __name__ == "__main__":
    main()
