"""What watching a run costs: steps with each guard beside steps without, in turn.

Contestants are pipelines of the same plan in processes of their own: as it comes (counts, progress, the check for
forks: always on), with ``check_finite="loss"`` and ``"boundaries"``, and with every step logged; and, with
``--baseline``, as it comes in another checkout, of a version without guards say. They make some steps each in turn, for
many rounds. Reported is the quotient of the medians over all rounds, and the quartiles of the quotients by round. What
counts is also timed by itself, which tells more than a quotient of two steps where that is below the noise. Two workers
with one thread each; run on an otherwise idle machine:

    git worktree add /tmp/before/stagecut COMMIT
    python benchmarks/guards.py --model transformer --baseline /tmp/before
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

STEPS = 2  # of each contestant in a round
WARM_UP = 4
REFERENCE = "as it comes"
CONTESTANTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {  # wishes, and environment
    REFERENCE: ({}, {}),
    "as it comes, again": ({}, {}),
    "check_finite='loss'": ({"check_finite": "loss"}, {}),
    "check_finite='boundaries'": ({"check_finite": "boundaries"}, {}),
    "STAGECUT_LOGS=debug": ({}, {"STAGECUT_LOGS": "debug"}),
}
BEFORE = "baseline"


def serve(model: str, plan: str, wishes: dict[str, str]) -> None:
    """Make steps, one for each line on stdin, and print their seconds."""
    import torch
    from step_time import cases

    import stagecut

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = cases(model)
    with stagecut.compile(
        case.model, ["cpu", "cpu"], loss_fn=case.loss_fn, plan=plan, threads_per_worker=1, **wishes
    ) as pm:
        for _ in range(WARM_UP):
            pm.step(case.x, target=case.y)
        print("ready", flush=True)
        for _ in sys.stdin:
            pm.model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            pm.step(case.x, target=case.y)
            print(time.perf_counter() - start, flush=True)


class Contestant:
    """A pipeline in a process of its own."""

    def __init__(self, model: str, plan: str, wishes: dict[str, str], environment: dict[str, str]) -> None:
        command = [sys.executable, __file__, "--model", model, "--serve", plan, json.dumps(wishes)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "STAGECUT_LOGS" in environment else None,
            text=True,
            env={**os.environ, **environment},
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{wishes} {environment} did not run")

    def step(self) -> float:
        """Run a step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def per_step_s(plan: str) -> tuple[float, float, int]:
    """Time what counts by itself: per instruction in a worker, and per step in the parent; count the instructions."""
    import torch

    import stagecut
    from stagecut.runtime.instructions import Op
    from stagecut.runtime.pickling import dumps, loads
    from stagecut.runtime.program import lower
    from stagecut.runtime.requests import TRAIN, StepReport, StepRequest
    from stagecut.runtime.schedules import schedule
    from stagecut.runtime.watch.counts import StepCounts
    from stagecut.runtime.watch.slow import SlowWorkers
    from stagecut.runtime.watch.stats import Tally

    found = stagecut.load(plan)
    layout, n = found.layout(), found.n_microbatches
    program = lower(found.schedule, layout, schedule(found.schedule, layout, n), n)
    longest = max(map(len, program.workers))

    counts, op = StepCounts(), Op.FORWARD
    rounds = 100_000
    start = time.perf_counter()
    for _ in range(rounds):
        pass
    empty_s = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(rounds):
        begin = started = time.perf_counter()
        end = time.perf_counter()
        if op is Op.REDUCE:
            counts.reduce_s += end - begin
        else:
            counts.waiting_s += started - begin
            counts.busy_s += end - started
    instruction_s = (time.perf_counter() - start - empty_s) / rounds

    tally, slow = Tally(found.devices, 1.0), SlowWorkers(lambda: found.predicted)
    request = StepRequest(TRAIN, 1, (0,) * n, ({},) * n, None, (1.0,) * n, 0)
    plain, counted = (StepReport(losses={0: torch.zeros(())}, counts=c) for c in ({}, {0: StepCounts()}))
    slow.look({0: 1.0, 1: 1.0}, n, 1.0)  # simulates the plan
    seconds = []
    for report in (plain, counted):
        start = time.perf_counter()
        for _ in range(2_000):
            merged = StepReport()
            for _ in range(layout.n_workers):
                merged.merge(loads(dumps(report)))
            if report is counted:
                tally.add(request, merged, 1.0)
                slow.look({0: 1.0, 1: 1.2}, n, 1.0)
        seconds.append((time.perf_counter() - start) / 2_000)
    return instruction_s, max(0.0, seconds[1] - seconds[0]), longest


def main() -> None:
    """Let contestants run in turn, and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["transformer", "resnet50", "mlp"], default="transformer")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--baseline", type=Path, help="a folder in which another checkout lies as stagecut")
    parser.add_argument("--without", action="append", default=[], choices=list(CONTESTANTS)[1:])
    parser.add_argument("--serve", nargs=2, metavar=("PLAN", "WISHES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.model, options.serve[0], json.loads(options.serve[1]))
        return
    from step_time import cases

    import stagecut

    case = cases(options.model)
    contestants = {name: given for name, given in CONTESTANTS.items() if name not in options.without}
    if options.baseline is not None:
        contestants[BEFORE] = ({}, {"PYTHONPATH": str(options.baseline)})
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/plan.json"
        stagecut.plan(
            case.model, ["cpu", "cpu"], example_inputs=(case.x,), loss_fn=case.loss_fn, example_target=case.y, stages=2,
            microbatches=options.microbatches, schedule="1f1b", threads_per_worker=1, costs="analytic",
        ).save(path)  # fmt: skip
        running = {name: Contestant(options.model, path, *given) for name, given in contestants.items()}
        times: dict[str, list[float]] = {name: [] for name in running}
        for at in range(options.rounds):
            order = list(running) if at % 2 else list(reversed(running))
            for name in order:
                times[name].append(statistics.mean(running[name].step() for _ in range(STEPS)))
        for contestant in running.values():
            contestant.close()
        instruction_s, step_s, n_instructions = per_step_s(path)
    _report(times, BEFORE if options.baseline is not None else REFERENCE)
    whole_s = statistics.median(times[REFERENCE])
    share = (n_instructions * instruction_s + step_s) / whole_s
    print(
        f"\nCounting by itself: {instruction_s * 1e9:.0f} ns for each of {n_instructions} instructions of a worker and "
        f"{step_s * 1e6:.1f} us a step in the parent: {share:.4%} of a step."
    )


def _report(times: dict[str, list[float]], reference: str) -> None:
    print(f"| | median step | over {reference!r} | quartiles by round |\n|---|---|---|---|")
    base = times[reference]
    for name, own in times.items():
        quotients = [a / b for a, b in zip(own, base)]
        low, _, high = statistics.quantiles(quotients, n=4)
        over = statistics.median(own) / statistics.median(base)
        print(f"| {name} | {statistics.median(own) * 1e3:.1f} ms | {over:.4f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
