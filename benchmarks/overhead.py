"""What the runtime itself costs on CPU workers: the constants of partitioner/timing.py and partitioner/cpu.py.

    python benchmarks/overhead.py

Two workers, one thread each, a model with next to no compute. From profiled steps: how long a send keeps the sender
busy, how long a packet travels, how both grow with the packet, and what is left per compute instruction; from a worker
alone, what is left per step. Then gradients, in memory that was last used a step ago: storing one that was just made,
adding one that was just made, adding what a replica stored. And processes beside each other: two on two cores, four on
two cores, over one alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.partitioner.cpu import this_cpu
from stagecut.runtime.arena import Arena
from stagecut.runtime.program import Span, Timeline

MICROBATCHES = 16


class Wide(nn.Module):
    """One layer a stage, so that a packet of ``width`` floats a row crosses and little else happens.

    Layers, as a function of the inputs would be computed again on the second stage rather than sent.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width)
        self.second = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def timelines(width: int, steps: int) -> list[Timeline]:
    """Profile ``steps`` steps in which every microbatch is one row of ``width`` floats.

    Targets are small: a worker that is still reading its own would not notice when a packet comes.
    """
    model = Wide(width)
    x = torch.randn(MICROBATCHES, width)
    options = {"microbatches": MICROBATCHES, "schedule": "1f1b", "costs": "analytic", "threads_per_worker": 1}
    y = torch.zeros(MICROBATCHES, 1)
    with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=lambda out, y: F.mse_loss(out[:, :1], y), **options) as pm:
        return [pm.profile(x, target=y, steps=1).timeline for _ in range(steps)]


def busy_s(timeline: Timeline, op: str) -> float:
    return statistics.median(span.end_s - span.start_s for span in timeline.spans if span.op == op)


def travel_s(timeline: Timeline) -> float:
    """Return the seconds from the end of the last send to the start of the compute that waits for it.

    It is a gradient, for which the first worker has nothing else to do than wait; when the first activation is sent the
    second worker may not have heard of the step yet.
    """
    last = MICROBATCHES - 1
    (sent,) = [s.end_s for s in timeline.spans if s.op == "send gradient" and s.microbatch == last]
    (used,) = [s.start_s for s in timeline.spans if s.op == "B" and s.worker == 0 and s.microbatch == last]
    return used - sent


def per_action_s(timeline: Timeline) -> float:
    """Return worker 1's time per compute instruction in its steady state."""
    mine: list[Span] = sorted((s for s in timeline.spans if s.worker == 1 and s.op in "FB"), key=lambda s: s.start_s)
    steady = mine[len(mine) // 4 : -len(mine) // 4]
    return (steady[-1].end_s - steady[0].start_s) / len(steady)


def rest_of_step_s(steps: int) -> float:
    """Return what a step of one worker takes beside its computes."""
    model, x = Wide(16), torch.randn(4, 16)
    options = {"microbatches": 1, "costs": "analytic", "threads_per_worker": 1}
    left = []
    with stagecut.compile(model, ["cpu"], loss_fn=lambda out, y: F.mse_loss(out, y), **options) as pm:
        for _ in range(steps):
            timeline = pm.profile(x, target=x, steps=1).timeline
            start = time.perf_counter()
            pm.step(x, target=x)
            left.append(time.perf_counter() - start - timeline.busy_s(0))
    return statistics.median(left)


def gradient_copies(rounds: int = 20) -> dict[str, float]:
    """Return how many copies within caches storing and adding gradients takes, for 12 gradients of 4 MB."""
    names = [f"{worker}/{layer}" for worker in range(2) for layer in range(12)]
    arena = Arena.create([(name, torch.empty(1024, 1024)) for name in names])
    slots = {name: arena.view(name).zero_() for name in names}
    fresh = torch.ones(1024, 1024)
    works = {
        "storing": lambda layer: slots[f"0/{layer}"].copy_(fresh),
        "adding fresh": lambda layer: slots[f"0/{layer}"].add_(fresh),
        "adding a replica's": lambda layer: slots[f"0/{layer}"].add_(slots[f"1/{layer}"]),
    }
    n_bytes = 12 * fresh.nbytes
    found = {}
    for what, work in works.items():
        times = []
        for _ in range(rounds):
            seconds = 0.0
            for layer in range(12):
                fresh.add_(0.0)  # as if autograd had just made it
                start = time.perf_counter()
                work(layer)
                seconds += time.perf_counter() - start
            times.append(seconds)
        found[what] = statistics.median(times) * this_cpu().bytes_per_s / n_bytes
    return found


def busy_for(seconds: float) -> float:
    """Return how many steps of a small MLP a process of one thread makes in a second."""
    torch.set_num_threads(1)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.GELU())))
    x = torch.randn(256, 512)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        model(x).square().mean().backward()
        count += 1
    return count / (time.perf_counter() - start)


def beside(n_processes: int, alone: float, seconds: float = 4.0) -> float:
    """Return how many times as long a step takes with so many processes at once."""
    with ProcessPoolExecutor(n_processes) as pool:
        list(pool.map(busy_for, [0.5] * n_processes))
        rates = list(pool.map(busy_for, [seconds] * n_processes))
    return alone / statistics.mean(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    small, large_floats = timelines(16, options.steps), 1 << 20
    large = timelines(large_floats, options.steps)
    send_s = statistics.median(busy_s(t, "send activation") for t in small)
    large_send_s = statistics.median(busy_s(t, "send activation") for t in large)
    travel = statistics.median(travel_s(t) for t in small)
    large_travel = statistics.median(travel_s(t) for t in large)
    n_bytes = 4.0 * large_floats
    print(f"SEND_OVERHEAD_S   {send_s * 1e6:.0f} us")
    print(f"PACK_BYTES_PER_S  {n_bytes / max(large_send_s - send_s, 1e-9) / 1e9:.2f} GB/s")
    print(f"link latency      {travel * 1e6:.0f} us")
    print(f"link bandwidth    {n_bytes / max(large_travel - travel, 1e-9) / 1e9:.2f} GB/s")
    action_s = statistics.median(per_action_s(t) for t in small)
    print(f"one action        {action_s * 1e6:.0f} us, sends and tiny compute included")
    print(f"STEP_S            {rest_of_step_s(options.steps) * 1e3:.2f} ms")
    for what, copies in gradient_copies().items():
        print(f"{what:<20}{copies:.1f} copies within caches (_GRADIENT_COPIES, _ADDING_FRESH)")
    alone = 1 / beside(1, 1.0)
    print(f"BESIDE            {beside(2, alone):.3f}")
    print(f"SHARING           {beside(4, alone) / 2:.3f}")


if __name__ == "__main__":
    main()
