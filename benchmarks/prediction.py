"""Predicted against measured: step time and peak memory of several configurations of several models.

Costs are measured and all plans are made before anything runs; then the configurations run in turn, round by round,
so that a slower minute of the machine hits all of them. Run on an otherwise idle machine:

    python benchmarks/prediction.py --rounds 12

The first table has the median step of each configuration beside its prediction, and the peak resident memory of its
workers beside what the plan says. The second has the planner's own choice against the best of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.models.transformer import GPT, next_token_loss
from stagecut.partitioner.plan import Plan
from stagecut.vision_compat import import_torchvision

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "one device": {"devices": ["cpu"], "replicas": 1},
    "2 replicas": {"devices": ["cpu", "cpu"], "replicas": 2},
    "2 stages, fill-drain": {"devices": ["cpu", "cpu"], "replicas": 1, "schedule": "fill-drain", "microbatches": 4},
    "2 stages, 1f1b": {"devices": ["cpu", "cpu"], "replicas": 1, "schedule": "1f1b", "microbatches": 4},
    "2 stages x 2 replicas": {"devices": ["cpu"] * 4, "replicas": 2, "schedule": "1f1b", "microbatches": 2},
}


LOSSES = {"transformer": next_token_loss}


def models() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """Return model, batch and targets by name."""
    import_torchvision()
    from torchvision.models import resnet50

    tokens = torch.randint(1024, (16, 128))
    wide = nn.Sequential(
        *(layer for _ in range(12) for layer in (nn.Linear(1024, 1024), nn.GELU())), nn.Linear(1024, 10)
    )
    return {
        "transformer": (GPT(1024, 256, 6, 8, 128), tokens, torch.randint(1024, (16, 128))),
        "resnet50": (resnet50(), torch.randn(64, 3, 64, 64), torch.randint(1000, (64,))),
        "mlp": (wide, torch.randn(512, 1024), torch.randint(10, (512,))),
    }


@dataclass
class Row:
    """One configuration of one model: seconds of a step and bytes of its workers, predicted and measured."""

    model: str
    configuration: str
    predicted_s: float
    measured_s: float
    low_s: float
    high_s: float
    predicted_bytes: float
    measured_bytes: float


def base_bytes() -> float:
    """Return the resident bytes of a worker that has done next to nothing."""
    with stagecut.compile(nn.Linear(2, 2), ["cpu"], loss_fn=F.mse_loss, costs="analytic") as pm:
        x = torch.randn(4, 2)
        for _ in range(3):
            pm.step(x, target=x)
        return max(peak_bytes(pm))


def peak_bytes(pm: Any) -> list[float]:
    """Return the peak resident bytes of each worker process."""
    peaks = []
    for worker in pm._engine._pool.workers:
        lines = Path(f"/proc/{worker.process.pid}/status").read_text().splitlines()
        peaks.append(next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
    return peaks


def predicted_bytes(plan: Plan, base: float) -> float:
    """Return what the fullest worker holds: a fresh worker, and what the plan says of its tensors.

    A local worker has weights, gradients, and the memory that hands gradients over; optimizer state is the parent's.
    """
    return base + max(stage.worker_bytes for stage in plan.stages)


def run(name: str, rounds: int) -> tuple[list[Row], Plan]:
    """Plan all configurations of a model, then step each in turn."""
    model, x, y = models()[name]
    base = base_bytes()
    plans = {what: stagecut.plan(model, example_inputs=(x,), **wishes) for what, wishes in CONFIGURATIONS.items()}
    chosen = stagecut.plan(model, ["cpu", "cpu"], example_inputs=(x,))
    pipelines = {}
    for what, plan in plans.items():
        pm = stagecut.compile(
            copy.deepcopy(model),
            [list(stage.devices) for stage in plan.stages],
            loss_fn=LOSSES.get(name, F.cross_entropy),
            plan=plan,
            example_inputs=(x,),
        )
        pipelines[what] = pm
    times: dict[str, list[float]] = {what: [] for what in plans}
    for turn in range(rounds + 2):
        for what, pm in pipelines.items():
            pm.zero_grad(set_to_none=True)
            start = time.perf_counter()
            pm.step(x, target=y)
            if turn >= 2:
                times[what].append(time.perf_counter() - start)
    rows = []
    for what, plan in plans.items():
        quartiles = statistics.quantiles(times[what], n=4)
        held = max(peak_bytes(pipelines[what]))
        predicted = predicted_bytes(plan, base)
        rows.append(Row(name, what, plan.prediction.step_s, quartiles[1], quartiles[0], quartiles[2], predicted, held))
    for pm in pipelines.values():
        pm.close()
    return rows, chosen


def table(rows: list[Row]) -> str:
    """Write the rows as a Markdown table."""
    lines = [
        "| model | configuration | predicted | measured (quartiles) | error | memory predicted | measured | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.model} | {row.configuration} | {row.predicted_s * 1e3:.1f} ms | {row.measured_s * 1e3:.1f} ms "
            f"({row.low_s * 1e3:.1f} to {row.high_s * 1e3:.1f}) | {row.predicted_s / row.measured_s - 1:+.1%} | "
            f"{row.predicted_bytes / 2**20:.0f} MiB | {row.measured_bytes / 2**20:.0f} MiB | "
            f"{row.predicted_bytes / row.measured_bytes - 1:+.1%} |"
        )
    errors = sorted(abs(row.predicted_s / row.measured_s - 1) for row in rows)
    held = sorted(abs(row.predicted_bytes / row.measured_bytes - 1) for row in rows)
    lines.append("")
    lines.append(
        f"{len(rows)} configurations: step off by {statistics.median(errors):.1%} in the median, "
        f"{errors[-1]:.1%} at worst; memory off by {statistics.median(held):.1%} in the median, "
        f"{held[-1]:.1%} at worst."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--model", action="append", choices=["transformer", "resnet50", "mlp"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for name in options.model or ["transformer", "resnet50", "mlp"]:
        found, chosen = run(name, options.rounds)
        rows += found
        best = min(found, key=lambda row: row.measured_s)
        print(
            f"{name}: chosen {', '.join(map(str, [len(s.devices) for s in chosen.stages]))} device(s) a stage, "
            f"{chosen.n_microbatches} microbatches, predicted {chosen.prediction.step_s * 1e3:.1f} ms; "
            f"best measured: {best.configuration}, {best.measured_s * 1e3:.1f} ms",
            flush=True,
        )
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
