"""What the runtime itself costs on CPU workers: the constants of partitioner/predict.py and partitioner/cpu.py.

    python benchmarks/overhead.py

Two workers, one thread each, a model with next to no compute. From profiled steps: how long a send keeps the sender
busy, how long a packet travels, how both grow with the packet, and what is left per compute instruction.
"""

from __future__ import annotations

import argparse
import statistics
import warnings

import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.runtime.program import Span, Timeline

MICROBATCHES = 16


class Wide(nn.Module):
    """One multiplication a stage, so that a packet of ``width`` floats a row crosses and little else happens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(width))
        self.second = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.first) * self.second


def timelines(width: int, steps: int) -> list[Timeline]:
    """Profile ``steps`` steps in which every microbatch is one row of ``width`` floats."""
    model = Wide(width)
    x = torch.randn(MICROBATCHES, width)
    options = {"microbatches": MICROBATCHES, "schedule": "1f1b", "costs": "analytic", "threads_per_worker": 1}
    with stagecut.compile(model, ["cpu", "cpu"], loss_fn=lambda out, y: F.mse_loss(out, y), **options) as pm:
        return [pm.profile(x, target=x, steps=1).timeline for _ in range(steps)]


def busy_s(timeline: Timeline, op: str) -> float:
    return statistics.median(span.end_s - span.start_s for span in timeline.spans if span.op == op)


def travel_s(timeline: Timeline) -> float:
    """Return the seconds from the end of the first send to the start of the compute that waits for it."""
    (sent,) = [s.end_s for s in timeline.spans if s.op == "send activation" and s.microbatch == 0]
    (used,) = [s.start_s for s in timeline.spans if s.op == "F" and s.worker == 1 and s.microbatch == 0]
    return used - sent


def per_action_s(timeline: Timeline) -> float:
    """Return worker 1's time per compute instruction in its steady state."""
    mine: list[Span] = sorted((s for s in timeline.spans if s.worker == 1 and s.op in "FB"), key=lambda s: s.start_s)
    steady = mine[len(mine) // 4 : -len(mine) // 4]
    return (steady[-1].end_s - steady[0].start_s) / len(steady)


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


if __name__ == "__main__":
    main()
