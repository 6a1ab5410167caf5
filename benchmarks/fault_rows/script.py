"""What the rows about processes run: trains two stages, and hangs, forks or ends as its argument says.

    python script.py steps|hang|fork|leave

Prints a line for each thing that happened: worker pids, then losses, or the line that a forked child saw.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings

import torch
from torch import nn

import stagecut


class Slow(nn.Module):
    """Waits for ever where a number is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x.detach() > 1000).any()):
            print("inside", flush=True)
            threading.Event().wait()
        return x


def main(what: str) -> None:
    """Do it."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell has it ignored
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Slow(), nn.Linear(64, 64))
    x, y = torch.rand(8, 64), torch.rand(8, 64)
    pm = stagecut.compile(
        model,
        [["cpu"], ["cpu"]],
        loss_fn=lambda output, target: nn.functional.mse_loss(output, target),
        costs="analytic",
        threads_per_worker=1,
    )
    losses = []
    for _ in range(3):
        losses.append(pm.step(x, target=y).loss.item())
        with torch.no_grad():
            for parameter in pm.parameters():
                parameter -= 0.1 * parameter.grad
        pm.zero_grad()
    print(*(worker.process.pid for worker in pm._engine.pool.workers), flush=True)
    print(*(f"{loss:.9g}" for loss in losses), flush=True)
    if what == "hang":
        with torch.no_grad():
            model[0].weight.fill_(1e5)
        pm.step(x, target=y)
    if what == "fork":
        child = os.fork()
        if child == 0:
            try:
                pm.step(x, target=y)
            except stagecut.StagecutError as error:
                print(f"child: {error.message}", flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(f"parent: {pm.step(x, target=y).loss.item():.9g}", flush=True)
    if what == "steps":
        pm.close()


if __name__ == "__main__":
    main(sys.argv[1])
