"""Gradients of the steps that step_time.py times, in float64, beside those of the unsplit model.

torch.distributed.pipelining and stagecut run one step each, on the same stages, in the same schedule and microbatches.
An error is that of the parameter that is furthest off: the norm of the difference over the norm of the gradient that
the unsplit model gets from the same microbatches.

    python benchmarks/step_gradients.py --model transformer
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from same_stages import Stages
from step_time import COUNTS, SCHEDULES, Case, cases, hand_to_peer, peer
from torch import nn

import stagecut
from stagecut.partitioner.loss import Loss
from stagecut.partitioner.plan import Plan

Gradients = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class Row:
    """The largest error of each in one schedule."""

    schedule: str
    n_microbatches: int
    peer: float
    ours: float


def in_float64(case: Case) -> Case:
    """Return the case in float64; its integers stay."""
    x, y = (value.double() if value.is_floating_point() else value for value in (case.x, case.y))
    return Case(copy.deepcopy(case.model).double(), x, y, case.loss_fn)


def gradients(model: nn.Module) -> Gradients:
    """Return the gradients of a model by the names of its parameters."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def unsplit(case: Case, n_microbatches: int) -> Gradients:
    """Return what the unsplit model gets from the same microbatches."""
    model = copy.deepcopy(case.model)
    for xs, ys in zip(case.x.chunk(n_microbatches), case.y.chunk(n_microbatches)):
        (case.loss_fn(model(xs), ys) / n_microbatches).backward()
    return gradients(model)


def of_peer(case: Case, stages: Stages, plan: Plan) -> Gradients:
    """Return what torch.distributed.pipelining gets, in two processes."""
    with tempfile.TemporaryDirectory() as folder:
        hand_to_peer(folder, plan, stages, case)
        ranks = [subprocess.Popen([sys.executable, __file__, "--rank", str(rank), folder]) for rank in (0, 1)]
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise RuntimeError(f"{plan.schedule} with {plan.n_microbatches} microbatches did not run")
        return {name: g for rank in (0, 1) for name, g in torch.load(Path(folder, f"{rank}.pt")).items()}


def of_stagecut(case: Case, plan: Plan) -> Gradients:
    """Return what stagecut gets, in two workers."""
    model = copy.deepcopy(case.model)
    with stagecut.compile(model, ["cpu"] * 2, loss_fn=case.loss_fn, plan=plan, threads_per_worker=1) as pm:
        pm.step(case.x, target=case.y)
        return gradients(model)


def error(found: Gradients, wanted: Gradients) -> float:
    """Return the largest error of a parameter; infinite where one has no gradient that should have."""
    if found.keys() != wanted.keys():
        raise ValueError(f"other parameters: {sorted(found.keys() ^ wanted.keys())}")
    worst = 0.0
    for name, want in wanted.items():
        got = found[name]
        if want is not None:
            worst = max(worst, float("inf") if got is None else float((got - want).norm() / want.norm()))
    return worst


def study(case: Case, stages: Stages, schedule: str, count: int) -> Row:
    """Run one schedule with one count of microbatches."""
    plan = stages.plan(SCHEDULES[schedule][1], schedule, count)
    wanted = unsplit(case, count)
    return Row(schedule, count, error(of_peer(case, stages, plan), wanted), error(of_stagecut(case, plan), wanted))


def rank(number: int, folder: str) -> None:
    """Run one step as a rank of torch.distributed.pipelining, and leave the gradients."""
    run, stages = peer(number, folder)
    run()
    found = {name: g for stage in stages.values() for name, g in gradients(stage.module).items()}
    torch.save(found, Path(folder, f"{number}.pt"))


def main() -> None:
    """Run the chosen model in every schedule, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["transformer", "resnet50", "mlp"], required=True)
    parser.add_argument("--schedule", action="append", choices=list(SCHEDULES))
    parser.add_argument("--microbatches", action="append", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = in_float64(cases(options.model))
    print("| schedule | microbatches | torch.distributed.pipelining | stagecut |\n|---|---|---|---|", flush=True)
    for count in options.microbatches or COUNTS:
        stages = Stages(case.model, case.x, len(case.x) // count, Loss(case.loss_fn, case.y, len(case.x)))
        for name in options.schedule or SCHEDULES:
            row = study(case, stages, name, count)
            print(f"| {name} | {count} | {row.peer:.1e} | {row.ours:.1e} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(int(sys.argv[2]), sys.argv[3])
    else:
        main()
