"""Training steps of plain PyTorch to compare with: one process, or DistributedDataParallel over several.

:class:`Plain` starts the processes; they stay, and run one step for each line that they are sent.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stagecut.vision_compat import import_torchvision


class Plain:
    """``n_processes`` replicas of a model with ``n_threads`` each, on equal shares of a batch."""

    def __init__(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss_fn: Any, n_processes: int, n_threads: int
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        shares = list(zip(x.chunk(n_processes), y.chunk(n_processes)))
        for rank, (own_x, own_y) in enumerate(shares):
            given = cloudpickle.dumps((model, own_x.clone(), own_y.clone(), loss_fn))
            Path(self._folder.name, f"{rank}.pkl").write_bytes(given)
        self._processes = []
        for rank in range(n_processes):
            command = [sys.executable, __file__, self._folder.name, str(rank), str(n_processes), str(n_threads)]
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            )
        for process in self._processes:
            assert self._read(process) == "ready"

    @staticmethod
    def _read(process: Any) -> str:
        return str(process.stdout.readline()).strip()

    def step(self) -> float:
        """Run one step on all processes and return the seconds that the slowest took."""
        for process in self._processes:
            process.stdin.write("step\n")
        return max(float(self._read(process)) for process in self._processes)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.stdin.close()
            process.stdout.close()
            process.wait()
        self._folder.cleanup()


def serve(folder: str, rank: int, n_processes: int, n_threads: int) -> None:
    """Be one of the processes."""
    import torch.distributed as dist

    torch.set_num_threads(n_threads)
    import_torchvision()  # the model may be from there
    model, x, y, loss_fn = pickle.loads(Path(folder, f"{rank}.pkl").read_bytes())
    if n_processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_processes)
        model = DistributedDataParallel(model)
    for _ in range(2):
        loss_fn(model(x), y).backward()
    print("ready", flush=True)
    for _ in sys.stdin:
        model.zero_grad(set_to_none=True)
        if n_processes > 1:
            dist.barrier()
        start = time.perf_counter()
        loss_fn(model(x), y).backward()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
