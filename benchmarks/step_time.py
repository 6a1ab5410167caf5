"""Step time of the demo's plan: stagecut, torch.distributed.pipelining on the same stages, and one process.

All are started once and then run in turn, round by round, so that a slower minute of the machine hits all of them.
Reported are medians, and the ratio of each round with its quartiles. Run on an otherwise idle machine:

    python benchmarks/step_time.py
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.models.digits import load_digits
from stagecut.models.resnet import DigitsResNet
from stagecut.runtime.stage import Seed, build_module, input_names

BATCH, MICROBATCHES = 64, 4


class StageModule(nn.Module):
    """One stage of the plan as the plain module that torch.distributed.pipelining takes: tensors in, tensors out."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.module = build_module(spec, Seed())
        self.names = input_names(spec)
        self.sends = tuple(value for group in spec.wires_out for value in group.values)
        self.results = self.sends or tuple(leaf.node for leaf in spec.outputs)

    def forward(self, *inputs: torch.Tensor) -> Any:
        results = self.module(*inputs)
        values = tuple(results[name] for name in self.results)
        return values[0] if len(values) == 1 else values


def serve(run: Callable[[], None]) -> None:
    """Run and time one step for every line on stdin."""
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def peer(rank: int, folder: str) -> None:
    """Be one rank of torch.distributed.pipelining's 1F1B."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/peer", rank=rank, world_size=2)
    module, x, y = pickle.loads(Path(folder, f"peer{rank}.pkl").read_bytes())
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=F.cross_entropy)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=[])

    serve(run)


def single(folder: str, n_microbatches: int) -> None:
    """Be the unsplit model in one process with one thread, in the same microbatches or in one piece."""
    torch.set_num_threads(1)
    model, x, y = pickle.loads(Path(folder, "single.pkl").read_bytes())

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for xs, ys in zip(x.chunk(n_microbatches), y.chunk(n_microbatches)):
            (F.cross_entropy(model(xs), ys) / n_microbatches).backward()

    serve(run)


class Other:
    """A contestant in other processes; a step takes as long as its slowest process."""

    def __init__(self, *commands: list[str]) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for command in commands
        ]
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"

    def step(self) -> float:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return max(float(process.stdout.readline()) for process in self.processes if process.stdout is not None)

    def close(self) -> None:
        for process in self.processes:
            process.communicate()


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_digits()
    x, y = data.x_train[:BATCH], data.y_train[:BATCH]
    model = DigitsResNet()
    with (
        tempfile.TemporaryDirectory() as folder,
        stagecut.compile(
            model,
            ["cpu", "cpu"],
            loss_fn=F.cross_entropy,
            schedule="1f1b",
            microbatches=MICROBATCHES,
            threads_per_worker=1,
        ) as pm,
    ):
        Path(folder, "single.pkl").write_bytes(cloudpickle.dumps((model, x, y)))
        pm.prepare(x)
        assert pm._spec is not None
        for stage in pm._spec.stages:
            module = StageModule(stage)
            Path(folder, f"peer{stage.index}.pkl").write_bytes(cloudpickle.dumps((module, x, y)))
        peers = Other(["--peer", "0", folder], ["--peer", "1", folder])
        pieces = Other(["--single", str(MICROBATCHES), folder])
        whole = Other(["--single", "1", folder])

        def ours() -> float:
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            pm.step(x, target=y)
            return time.perf_counter() - start

        contestants = {
            "stagecut, 2 workers": ours,
            "torch.distributed.pipelining, 2 ranks": peers.step,
            "1 process, 1 thread, same microbatches": pieces.step,
            "1 process, 1 thread, whole batch": whole.step,
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for round_ in range(options.rounds + 5):
            for name, step in contestants.items():
                seconds = step()
                if round_ >= 5:
                    times[name].append(seconds)
        predicted_s = pm.plan.prediction.step_s
        for other in (peers, pieces, whole):
            other.close()
    mine = times["stagecut, 2 workers"]
    print(f"{'':<42} {'median':>9}   stagecut / it, by round: median (quartiles)")
    for name, values in times.items():
        ratios = [a / b for a, b in zip(mine, values)]
        print(
            f"{name:<42} {statistics.median(values) * 1e3:>6.1f} ms   {quartiles(ratios) if values is not mine else ''}"
        )
    measured_s = statistics.median(mine)
    print(
        f"predicted {predicted_s * 1e3:.1f} ms, measured {measured_s * 1e3:.1f} ms: {predicted_s / measured_s - 1:+.1%}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(int(sys.argv[2]), sys.argv[3])
    elif sys.argv[1:2] == ["--single"]:
        single(sys.argv[3], int(sys.argv[2]))
    else:
        main()
