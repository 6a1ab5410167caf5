"""Predicted against measured: step time and peak memory of several configurations of several models.

All plans are made before anything runs. Then come several sittings: costs are measured afresh, every plan's step is
predicted from them, and the configurations run a few steps each, in turns that each begin with another. A prediction is
compared with the steps of its own sitting, since a shared machine is faster now and slower then. Run on an otherwise
idle machine:

    python benchmarks/prediction.py
    python benchmarks/prediction.py --families

The table has the median step of each configuration beside its prediction, and the peak resident memory of its workers
beside what the plan says. The lines above it have the choice that ``stagecut.compile`` makes (trials included, where
predictions are too close to tell) against the best of all: the configurations, one process of plain PyTorch with two
threads, and DistributedDataParallel over two processes with one thread each. With ``--families`` the configurations are
two stages under every schedule that runs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plain import Plain
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.models.transformer import GPT, next_token_loss
from stagecut.partitioner.assemble import Decision, assemble
from stagecut.partitioner.configurations import rows_of
from stagecut.partitioner.describe import describe
from stagecut.partitioner.loss import Loss
from stagecut.partitioner.plan import Plan
from stagecut.partitioner.pricing import Pricer
from stagecut.runtime.schedules import TRAINING_SCHEDULES
from stagecut.vision_compat import import_torchvision

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "one device": {"devices": ["cpu"], "replicas": 1},
    "2 replicas": {"devices": ["cpu", "cpu"], "replicas": 2},
    "2 stages, fill-drain": {"devices": ["cpu", "cpu"], "replicas": 1, "schedule": "fill-drain", "microbatches": 4},
    "2 stages, 1f1b": {"devices": ["cpu", "cpu"], "replicas": 1, "schedule": "1f1b", "microbatches": 4},
    "2 stages x 2 replicas": {"devices": ["cpu"] * 4, "replicas": 2, "schedule": "1f1b", "microbatches": 2},
}
FAMILIES: dict[str, dict[str, Any]] = {
    f"2 stages, {name}": {"devices": ["cpu", "cpu"], "replicas": 1, "schedule": name, "microbatches": 4}
    for name in TRAINING_SCHEDULES
}
CHOSEN = "the planner's choice"
TURNS = 2  # that each has in a sitting
LOSSES = {"transformer": next_token_loss}
MODELS = ("transformer", "resnet50", "mlp", "tiny")


def models() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """Return model, batch and targets by name."""
    import_torchvision()
    from torchvision.models import resnet50

    tokens = torch.randint(1024, (16, 128))
    wide = nn.Sequential(
        *(layer for _ in range(12) for layer in (nn.Linear(1024, 1024), nn.GELU())), nn.Linear(1024, 10)
    )
    tiny = nn.Sequential(*(layer for _ in range(200) for layer in (nn.Linear(64, 64), nn.ReLU())))
    for layer in tiny[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # else gradients become subnormal
    return {
        "transformer": (GPT(1024, 256, 6, 8, 128), tokens, torch.randint(1024, (16, 128))),
        "resnet50": (resnet50(), torch.randn(64, 3, 64, 64), torch.randint(1000, (64,))),
        "mlp": (wide, torch.randn(512, 1024), torch.randint(10, (512,))),
        "tiny": (tiny, torch.randn(128, 64), torch.randint(64, (128,))),
    }


@dataclass
class Row:
    """One configuration of one model: seconds of a step and bytes of its workers, predicted and measured.

    Seconds are medians over the sittings; ``error`` is the median of the sittings' own errors.
    """

    model: str
    configuration: str
    predicted_s: float
    measured_s: float
    error: float
    least_error: float
    most_error: float
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
    return [float(worker.peak_memory_bytes) for worker in pm.stats().workers]


def predicted_bytes(plan: Plan, base: float) -> float:
    """Return what the fullest worker holds: a fresh worker, and what the plan says of its tensors.

    A local worker has weights, gradients, and the memory that hands gradients over; optimizer state is the parent's.
    """
    return base + max(plan.worker_bytes)


class Predictor:
    """Predicts the step of plans from costs that it measures afresh each time."""

    def __init__(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss_fn: Any, plans: dict[str, Plan]
    ) -> None:
        self.captured = stagecut.capture(model, (x,))
        self.loss, self.x, self.plans = Loss(loss_fn, y, len(x)), x, plans

    def measure(self) -> dict[str, float]:
        """Measure the costs of every op and the loss, and return the predicted seconds by configuration."""
        with tempfile.TemporaryDirectory() as folder, environment(STAGECUT_CACHE=folder):
            return {what: self._step_s(plan) for what, plan in self.plans.items()}

    def _step_s(self, plan: Plan) -> float:
        cluster = describe(list(plan.devices)).with_groups([stage.workers for stage in plan.stages])
        assert cluster.groups is not None
        pricer = Pricer(self.captured, [self.x], cluster, loss=self.loss)
        priced = pricer.at(rows_of(cluster.groups, plan.n_microbatches, plan.batch_rows), plan.n_threads)
        recompute = tuple(stage.recompute for stage in plan.stages)
        decision = Decision(cluster, plan.stage_of, recompute, plan.schedule, plan.n_microbatches)
        return assemble(self.captured, priced, decision, plan.batch_rows).prediction.step_s


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass
class Found:
    """What came out for one model: rows, the planner's choice, and seconds of plain PyTorch's steps by its name."""

    rows: list[Row]
    chosen: Plan
    choice: str
    plain_s: dict[str, float]


def same_configuration(a: Plan, b: Plan) -> bool:
    """Say whether two plans differ in nothing but their cut."""
    devices = [(s.devices, s.workers) for s in a.stages] == [(s.devices, s.workers) for s in b.stages]
    recompute = [stage.recompute for stage in a.stages] == [stage.recompute for stage in b.stages]
    one_way = len(a.stages) == 1 or a.schedule == b.schedule
    return devices and recompute and one_way and (a.n_microbatches, a.n_threads) == (b.n_microbatches, b.n_threads)


def run(name: str, sittings: int, steps: int, configurations: dict[str, dict[str, Any]]) -> Found:
    """Plan all configurations of a model; then, several times, measure costs, predict, and run each in turn."""
    model, x, y = models()[name]
    loss_fn = LOSSES.get(name, F.cross_entropy)
    stagecut.end_workers()  # new ones, whose peaks of memory are this model's
    base = base_bytes()
    example = {"example_inputs": (x,), "loss_fn": loss_fn, "example_target": y}
    with tempfile.TemporaryDirectory() as folder, environment(STAGECUT_CACHE=folder):
        with stagecut.compile(copy.deepcopy(model), ["cpu", "cpu"], **example) as pm:
            chosen = pm.plan
        plans = {what: stagecut.plan(model, **wishes, **example) for what, wishes in configurations.items()}
    choice = next((what for what, plan in plans.items() if same_configuration(plan, chosen)), CHOSEN)
    plans.setdefault(choice, chosen)
    predictor = Predictor(copy.deepcopy(model), x, y, loss_fn, plans)
    pipelines = {}
    stagecut.end_workers()  # trials have run on them
    for what, plan in plans.items():
        pipelines[what] = stagecut.compile(copy.deepcopy(model), list(plan.devices), loss_fn=loss_fn, plan=plan)
        for _ in range(2):
            timed_step(pipelines[what], x, y)
    rivals = {
        "plain PyTorch, 2 threads": Plain(model, x, y, loss_fn, 1, 2),
        "plain DDP, 2 x 1 thread": Plain(model, x, y, loss_fn, 2, 1),
    }
    predicted: dict[str, list[float]] = {what: [] for what in plans}
    times: dict[str, list[list[float]]] = {what: [] for what in plans}
    contenders: dict[str, Callable[[], float]] = {what: partial(timed_step, pm, x, y) for what, pm in pipelines.items()}
    contenders |= {what: rival.step for what, rival in rivals.items()}
    gc.collect()
    gc.freeze()  # what this process keeps of all configurations is no part of the steps of one
    for sitting in range(sittings):
        for what, seconds in predictor.measure().items():
            predicted[what].append(seconds)
        for what in contenders:
            times.setdefault(what, []).append([])
        for turn in range(TURNS):
            for what in rotated(list(contenders), TURNS * sitting + turn):
                contenders[what]()  # its memory was not used for a while
                times[what][-1].extend(contenders[what]() for _ in range(steps))
    rows = []
    for what, plan in plans.items():
        medians = [statistics.median(sitting) for sitting in times[what]]
        errors = sorted(p / m - 1 for p, m in zip(predicted[what], medians))
        rows.append(
            Row(
                name,
                what,
                statistics.median(predicted[what]),
                statistics.median(medians),
                statistics.median(errors),
                errors[0],
                errors[-1],
                predicted_bytes(plan, base),
                max(peak_bytes(pipelines[what])),
            )
        )
    gc.unfreeze()
    for pm in (*pipelines.values(), *rivals.values()):
        pm.close()
    plain_s = {what: statistics.median(map(statistics.median, times[what])) for what in rivals}
    return Found(rows, chosen, choice, plain_s)


def rotated(names: list[str], by: int) -> list[str]:
    """Begin with another name each time, so that nobody always comes after the same one."""
    by = 3 * by % len(names)
    return names[by:] + names[:by]


def choice_line(name: str, found: Found, measured: dict[str, float]) -> str:
    """Compare the planner's choice with the best of all that ran."""
    best = min(measured, key=measured.__getitem__)
    plain = ", ".join(f"{what} {seconds * 1e3:.1f} ms" for what, seconds in found.plain_s.items())
    replicas = ", ".join(str(len(stage.devices)) for stage in found.chosen.stages)
    return (
        f"{name}: chosen {found.choice} ({replicas} device(s) a stage, {found.chosen.n_microbatches} microbatches), "
        f"measured {measured[found.choice] * 1e3:.1f} ms; best: {best}, {measured[best] * 1e3:.1f} ms; "
        f"ratio {measured[found.choice] / measured[best]:.3f}; {plain}; {found.chosen.reasons[0]}"
    )


def timed_step(pm: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the seconds of one training step without the optimizer."""
    pm.zero_grad(set_to_none=True)
    start = time.perf_counter()
    pm.step(x, target=y)
    return time.perf_counter() - start


def table(rows: list[Row]) -> str:
    """Write the rows as a Markdown table."""
    lines = [
        "| model | configuration | predicted | measured | error (sittings) | memory predicted | measured | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.model} | {row.configuration} | {row.predicted_s * 1e3:.1f} ms | {row.measured_s * 1e3:.1f} ms | "
            f"{row.error:+.1%} ({row.least_error:+.1%} to {row.most_error:+.1%}) | "
            f"{row.predicted_bytes / 2**20:.0f} MiB | {row.measured_bytes / 2**20:.0f} MiB | "
            f"{row.predicted_bytes / row.measured_bytes - 1:+.1%} |"
        )
    errors = sorted(abs(row.error) for row in rows)
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
    parser.add_argument("--sittings", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each configuration in a turn; a sitting has two")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--families", action="store_true", help="two stages under every schedule that runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for name in options.model or MODELS:
        found = run(name, options.sittings, options.steps, FAMILIES if options.families else CONFIGURATIONS)
        rows += found.rows
        measured = {row.configuration: row.measured_s for row in found.rows} | found.plain_s
        print(choice_line(name, found, measured), flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
