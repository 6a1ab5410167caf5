"""Worst relative error of loss and gradients over random models, cuts, schedules and batch sizes, in float64.

    python benchmarks/parity.py --cases 300

The cases are those of tests/exactness, drawn from seeds: DAG models with skips, fan-out, ties, frozen and unused
parameters, several inputs and outputs, in-place and opaque ops; 1 to 4 stages; 1 to 3 replicas each; both schedules.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from dag_models import RandomChooser, draw_case, worst_error

import stagecut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    worst, worst_seed, stages = 0.0, -1, 0
    for seed in range(options.first_seed, options.first_seed + options.cases):
        case = draw_case(RandomChooser(seed), replicas=(1, 1, 2, 3))
        with stagecut.compile(case.model, case.devices, loss_fn=case.loss, plan=case.plan, launch="inline") as pm:
            error = worst_error(case, pm.step(*case.args, target=case.target, **case.kwargs).loss)
        stages += len(case.plan.stages)
        if error > worst:
            worst, worst_seed = error, seed
        if sys.stderr.isatty():
            print(f"\r{seed - options.first_seed + 1}/{options.cases}", end="", file=sys.stderr)
    print(f"{options.cases} cases, {stages} stages: worst relative error {worst:.2e} (seed {worst_seed})")


if __name__ == "__main__":
    main()
