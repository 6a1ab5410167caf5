"""Pipelines on accelerators beside the plain loop on one of them, and beside each other: exact, and how fast.

    python benchmarks/accelerators.py --devices cuda:0

For one device: stagecut on it, two workers that share it, and a stage on it before one on the CPU. For several: a stage
on each as well, and a replica on each. The reference is what a script without stagecut does: eager forwards and
backwards of the same microbatches on the first device, gradients accumulated. All run in turn; reported are medians,
the ratio of each to the reference by round with quartiles, the largest relative error of any gradient (the pipeline's
own check against the unsplit model on the first device), and the peak of what torch has allocated, where it says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

import stagecut
from stagecut.models.transformer import GPT, next_token_loss


class Eager:
    """The plain loop on one device."""

    def __init__(self, model: nn.Module, device: str, x: torch.Tensor, y: torch.Tensor, microbatches: int) -> None:
        self._model = model.to(device)
        self._device = torch.device(device)
        self._pieces = list(zip(x.to(device).chunk(microbatches), y.to(device).chunk(microbatches)))

    def step(self) -> None:
        """Run one step, and wait until the device has."""
        self._model.zero_grad()
        for x, y in self._pieces:
            (next_token_loss(self._model(x), y) / len(self._pieces)).backward()
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def contestants(devices: list[str]) -> dict[str, tuple[list[list[str]], int]]:
    """Name the pipelines: their stages with the devices of their replicas, and how many replicas there are."""
    first = devices[0]
    found = {
        f"{first}": ([[first]], 1),
        f"{first} twice": ([[first], [first]], 1),
        f"{first}, cpu": ([[first], ["cpu"]], 1),
    }
    if len(devices) > 1:
        found[", ".join(devices)] = ([[device] for device in devices], 1)
        found[f"{' | '.join(devices)}"] = ([devices], len(devices))
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", required=True, help="cuda:0, or cuda:0,cuda:1")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    devices = options.devices.split(",")

    def made() -> nn.Module:
        torch.manual_seed(0)
        return GPT(1024, options.width, max(1, options.width // 64), options.layers, 128, tied=False)

    x, y = torch.randint(1024, (2, options.rows, 128))
    eager = Eager(made(), devices[0], x, y, options.microbatches)
    steps: dict[str, Callable[[], object]] = {"plain loop": eager.step}
    pipelines = {}
    for name, (stages, n_replicas) in contestants(devices).items():
        pm = stagecut.compile(
            made(),
            stages,
            loss_fn=next_token_loss,
            microbatches=options.microbatches // n_replicas,
            schedule="1f1b",
            costs="analytic",
        )
        pipelines[name] = pm
        steps[name] = lambda pm=pm: (pm.zero_grad(), pm.step(x, target=y))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(options.rounds + 3):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if done >= 3:
                times[name].append(time.perf_counter() - begin)
    reference = times["plain loop"]
    print("| | median step | over the plain loop (quartiles by round) | worst gradient error | peak memory of each |")
    print("|---|---|---|---|---|")
    print(f"| plain loop on {devices[0]} | {statistics.median(reference) * 1e3:.1f} ms | 1 | | |")
    for name, pm in pipelines.items():
        ratios = [own / other for own, other in zip(times[name], reference)]
        low, _, high = statistics.quantiles(ratios, n=4)
        ratio = statistics.median(times[name]) / statistics.median(reference)
        peaks = [f"{(worker.peak_memory_bytes or 0) / 2**20:.0f} MiB" for worker in pm.stats().workers]
        error = pm.verify(x, target=y, raises=False).worst
        step_ms = statistics.median(times[name]) * 1e3
        print(
            f"| {name} | {step_ms:.1f} ms | {ratio:.3f} ({low:.3f} to {high:.3f}) | {error:.1e} | {', '.join(peaks)} |"
        )
        pm.close()


if __name__ == "__main__":
    main()
