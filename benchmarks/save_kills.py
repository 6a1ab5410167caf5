"""Kill a process at random moments while it saves, and load what is there.

    python benchmarks/save_kills.py --kills 200

A child (forked, so that it need not import torch again) fills all parameters with the number of the step and saves,
step after step, keeping three. It gets SIGKILL a random time after it began. Then the newest checkpoint is looked for
as `pm.load` does: it has to be whole, newer than the last one or the same, and every value in it of its own step.
Reported are bad loads, how many kills fell into the writing of a checkpoint (something unfinished lay there), and how
many steps were saved in all.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.errors import CheckpointError
from stagecut.runtime.checkpoint import read_state
from stagecut.runtime.checkpoint.folder import newest


def compiled() -> stagecut.Pipeline:
    """Compile two stages."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    x = torch.randn(8, 64)
    return stagecut.compile(
        model, [["cpu"], ["cpu"]], loss_fn=F.mse_loss, example_inputs=(x,), launch="inline", costs="analytic"
    )


def save_on(folder: Path, first: int, wait: bool, ready: int) -> None:
    """Save step after step until somebody ends it; a byte to ``ready`` says that it begins."""
    pm = compiled()
    os.write(ready, b".")
    for step in range(first, first + 1_000_000):
        with torch.no_grad():
            for parameter in pm.parameters():
                parameter.fill_(float(step))
        pm.save(folder, step, data=step, keep=3, wait=wait)


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compiled().close()  # all is imported, and need not be in each child
    moments = random.Random(options.seed)
    bad = unfinished = reached = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun, ready = os.pipe()
        for index in range(options.kills):
            child = os.fork()
            if child == 0:
                save_on(folder, reached + 1, index % 2 == 0, ready)
                os._exit(1)
            os.read(begun, 1)
            time.sleep(moments.uniform(0.0, 0.15))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            unfinished += any(path.name.startswith(".tmp") for path in folder.iterdir())
            try:
                path, manifest, passed = newest(folder)
            except CheckpointError:
                bad += reached > 0
                continue
            values = {float(value.flatten()[0]) for value in read_state(path).values()}
            bad += bool(passed) or values != {float(manifest.step)} or manifest.step < reached
            reached = manifest.step
    print(
        f"{options.kills} kills, {unfinished} of them while something was written, {reached} steps saved: "
        f"{bad} bad loads"
    )


if __name__ == "__main__":
    main()
