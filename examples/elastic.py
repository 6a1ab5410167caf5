"""Training that goes on with the machines that are left when one is cut off.

On each of two machines, with HOST one of them and a folder that both see:

    torchrun --nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-id run --rdzv-backend c10d \\
        --rdzv-endpoint HOST:29400 --rdzv-conf last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=5 \\
        examples/elastic.py --folder /shared/checkpoints

There is one stage for each rank. Whoever is left after a machine is gone plans again for the ranks there are, and goes
on from the newest whole checkpoint, which any plan can read: the losses are those of an undisturbed run, to the bit,
because the batch is cut into the same microbatches however many stages there are. Without torchrun it is one stage.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import stagecut


def make_model() -> nn.Module:
    """Make the same model every time."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(32, 4))


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch of a step, the same one on every rank and after every restart."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 32, generator=generator)
    return x, x[:, :4].argmax(dim=1)


def main() -> None:
    """Train, from wherever a checkpoint was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints are")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--timeout-s", type=float, default=30.0, help="how long a rank waits for another one")
    parser.add_argument("--losses", type=Path, help="a file for the losses of all steps, as JSON")
    options = parser.parse_args()

    torch.set_num_threads(1)
    under_torchrun = torch.distributed.is_torchelastic_launched()
    pm = stagecut.compile(
        make_model(),
        devices="ranks" if under_torchrun else ["cpu"],
        replicas=1,  # a stage each, so that every plan adds gradients up in the same order
        microbatches=4,
        costs="analytic",  # nothing is timed again after a restart
        loss_fn=F.cross_entropy,
        example_inputs=batch_of(0)[:1],
        timeout_s=options.timeout_s,
        threads_per_worker=1,
    )
    optimizer = torch.optim.AdamW(pm.parameters(), 3e-3)
    loaded = pm.resume(options.folder, optimizer=optimizer)
    losses = [] if loaded.data is None else loaded.data["losses"]
    is_first = not under_torchrun or torch.distributed.get_rank() == 0
    if is_first:
        print(f"stages: {len(pm.plan.stages)}, from step {loaded.step}", flush=True)
    for step in range(loaded.step + 1, options.steps + 1):
        x, y = batch_of(step)
        loss = pm.step(x, target=y).loss
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        pm.save(options.folder, step, optimizer=optimizer, data={"losses": losses}, keep=3)
        if is_first:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
    pm.close()
    if is_first and options.losses is not None:
        options.losses.write_text(json.dumps(losses))


main()
