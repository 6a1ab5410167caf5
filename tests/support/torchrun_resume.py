"""Run by tests/runtime/checkpoint/test_resume.py on every rank: training that is killed once, and goes on by itself."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import stagecut

STEPS = 10


def model() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(6, 3)).double()


def train(folder: Path, devices: str | list[str], killed_at: int) -> dict[str, object]:
    """Train, from where a checkpoint was left; rank 1 is killed once, while the checkpoint of a step is written."""
    torch.manual_seed(0)
    x, y = torch.randn(STEPS, 8, 6).double(), torch.arange(8) % 3
    pm = stagecut.compile(
        model(), devices, stages=2, loss_fn=F.cross_entropy, microbatches=2, costs="analytic", example_inputs=(x[0],),
        timeout_s=60, launch="auto" if devices == "ranks" else "inline",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loaded = pm.resume(folder, optimizer=optimizer, scheduler=scheduler)
    losses = [] if loaded.data is None else list(loaded.data)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    print(f"restart {restarts}: goes on from step {loaded.step}", flush=True)
    for step in range(loaded.step + 1, STEPS + 1):
        losses.append(float(pm.step(x[step - 1], target=y).loss))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        pm.save(folder, step, optimizer=optimizer, scheduler=scheduler, data=losses, keep=3, wait=False)
        if step == killed_at and restarts == "0" and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    state = pm.state_dict()
    pm.close()
    return {"losses": losses, "state": state}


if __name__ == "__main__":
    found = train(Path(sys.argv[1]), "ranks", int(sys.argv[2]))
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[3])
