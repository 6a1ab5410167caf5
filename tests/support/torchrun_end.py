"""Run under torchrun by tests/runtime/test_leaving.py: scripts of two ranks that leave a pipeline open at the end."""

import atexit
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

HOW, FOLDER = sys.argv[1], Path(sys.argv[2])
LONGEST_S = 60.0


def threads_of_gloo() -> int:
    return sum(path.read_text().startswith("pt_gloo") for path in Path("/proc/self/task").glob("*/comm"))


def at_the_end() -> None:
    """Run when stagecut is through: what is registered first is called last."""
    (FOLDER / f"rank-{rank}").touch()
    print(f"rank {rank} ends with {threads_of_gloo()} threads of gloo", flush=True)


atexit.register(at_the_end)

import stagecut  # noqa: E402
from stagecut.runtime.groups import all_ranks, peers_told  # noqa: E402

warnings.simplefilter("ignore")
torch.manual_seed(0)
if HOW == "a group of its own":
    import torch.distributed.nn  # later it would hold the group: as defaults of its functions

    dist.init_process_group("gloo")
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 3))
devices = [["cpu"], ["cpu"]] if HOW == "stages" else [["cpu", "cpu"]]
pm = stagecut.compile(model, devices=devices, loss_fn=F.cross_entropy, microbatches=2, costs="analytic", timeout_s=300)
x, y = torch.randn(8, 8), torch.arange(8) % 3
for _ in range(4):
    pm.step(x, target=y)
rank = dist.get_rank()
assert threads_of_gloo() >= 4, "the test looks for threads of another name"
if HOW == "stages":
    pm(x).sum().backward()
    pm.save(FOLDER / "checkpoints", step=4, wait=False)
elif HOW == "a group of its own":
    dist.destroy_process_group()
elif HOW == "in the middle" and rank == 1:
    try:
        with peers_told("in the test"):
            dist.all_reduce(torch.ones(1), group=all_ranks(300), async_op=True)  # which rank 0 does not come to
            raise ValueError("a user's own")
    except ValueError as error:
        print(error)
elif HOW == "in the middle":
    end = time.monotonic() + LONGEST_S
    while not (FOLDER / "rank-1").exists() and time.monotonic() < end:
        threading.Event().wait(0.05)
    assert (FOLDER / "rank-1").exists(), "rank 1 waits for rank 0, which does not come"
