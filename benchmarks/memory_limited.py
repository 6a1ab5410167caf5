"""Step time under a memory limit that one worker cannot meet: stagecut against torch.distributed.pipelining.

Each worker may hold less than the whole model needs however small its microbatches are, so that one device and data
parallelism are refused (this is checked, and the refusals are printed) and the planner has to make a pipeline. It
chooses its own cut, schedule, microbatches and recompute. The peers get stages of equal measured time of the same
ops, every schedule with every microbatch count, and no memory limit. All peers are tried in turn first; the fastest
of them then run in turn with stagecut. Two workers with one thread each; run on an otherwise idle machine:

    python benchmarks/memory_limited.py --rounds 30
"""

from __future__ import annotations

import argparse
import gc
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from prediction import LOSSES, models
from same_stages import StageModule, Stages
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.errors import InfeasibleError

COUNTS = (4, 8, 16)
# Per schedule, the stages of each of two ranks.
PEERS = {
    "ScheduleGPipe": ((0,), (1,)),
    "Schedule1F1B": ((0,), (1,)),
    "ScheduleInterleaved1F1B": ((0, 2), (1, 3)),
    "ScheduleInterleavedZeroBubble": ((0, 2), (1, 3)),
    "ScheduleZBVZeroBubble": ((0, 3), (1, 2)),
}
SHARE = 0.9  # of the least that one device needs
_WARM_UP = 2


@dataclass(frozen=True)
class Peer:
    """A schedule of torch.distributed.pipelining with a number of microbatches."""

    schedule: str
    n_microbatches: int

    def __str__(self) -> str:
        return f"{self.schedule.removeprefix('Schedule')}, {self.n_microbatches} microbatches"


@dataclass
class Result:
    """What a model took.

    Attributes:
        limit_bytes: of each worker; ``alone_bytes``: the least that one device needs.
        plan: the planner's choice; ``planned_bytes``: of its fullest stage.
        refusals: what the planner said to one device and to data parallelism.
        predicted_s: the plan's step; ``measured_s``: its median.
        screened_s: median of each peer while all were tried.
        peers_s: median of the fastest in turn with stagecut, best first.
        ratio: stagecut / the best of them, by round: lower quartile, median, upper quartile.
    """

    model: str
    limit_bytes: float
    alone_bytes: float
    plan: str
    planned_bytes: float
    refusals: dict[str, str]
    predicted_s: float
    measured_s: float
    screened_s: dict[str, float]
    peers_s: dict[str, float]
    ratio: tuple[float, float, float]


def least_alone_bytes(model: nn.Module, x: torch.Tensor) -> float:
    """Return the least that one device needs, over all counts of microbatches; recompute saves a lone stage nothing."""
    needs = []
    for count in (*COUNTS, 2 * COUNTS[-1]):
        plan = stagecut.plan(model, ["cpu"], example_inputs=(x,), microbatches=count, recompute=False, costs="analytic")
        needs.append(plan.stages[0].memory_bytes)
    return float(min(needs))


def refusals(model: nn.Module, x: torch.Tensor, limit_bytes: float) -> dict[str, str]:
    """Ask for one device and for data parallelism within the limit; return the errors.

    Raises:
        ValueError: one of them fits.
    """
    said: dict[str, str] = {}
    asked: dict[str, dict[str, Any]] = {
        "one device": {"devices": ["cpu"]},
        "2 replicas": {"devices": ["cpu", "cpu"], "replicas": 2},
    }
    for what, wishes in asked.items():
        try:
            stagecut.plan(
                model,
                example_inputs=(x,),
                memory_bytes=limit_bytes,
                threads_per_worker=1,
                costs="analytic",
                **wishes,
            )
        except InfeasibleError as error:
            said[what] = str(error)
        else:
            raise ValueError(f"{what} fits into {limit_bytes:,.0f} bytes")
    return said


def equal_stages(model: nn.Module, x: torch.Tensor, n_stages: int) -> list[StageModule]:
    """Cut the model into stages of equal measured time, as modules for torch.distributed.pipelining."""
    return Stages(model, x, x.shape[0] // COUNTS[1]).equal(n_stages)


def serve(rank: int, folder: str) -> None:
    """Be one rank: run a step of the peer whose schedule and microbatches each line of stdin names."""
    import torch.distributed as dist
    from torch.distributed import pipelining

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/peers", rank=rank, world_size=2)
    splits, x, y, loss_fn = pickle.loads(Path(folder, "peers.pkl").read_bytes())
    known: dict[Peer, Any] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        name, count = line.split()
        peer = Peer(name, int(count))
        mine = PEERS[name][rank]
        n_stages = sum(map(len, PEERS[name]))
        modules = splits[n_stages]
        if peer not in known:
            stages = [pipelining.PipelineStage(modules[s], s, n_stages, torch.device("cpu")) for s in mine]
            given = stages if len(mine) > 1 else stages[0]
            known[peer] = getattr(pipelining, name)(given, peer.n_microbatches, loss_fn=loss_fn)
        for s in mine:
            modules[s].zero_grad(set_to_none=True)
        dist.barrier()
        start = time.perf_counter()
        losses: list[torch.Tensor] = []
        inputs = (x,) if 0 in mine else ()
        results = {"target": y, "losses": losses} if n_stages - 1 in mine else {}
        known[peer].step(*inputs, **results)
        seconds = time.perf_counter() - start
        loss = torch.stack(losses).mean().item() if losses else float("nan")
        gc.collect()  # zero-bubble schedules leave their graphs in cycles, gigabytes after some steps
        print(seconds, loss, flush=True)


class Ranks:
    """The two processes of the peers; a step takes as long as the slower one."""

    def __init__(self, folder: str) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--peer", str(rank), folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"

    def step(self, peer: Peer) -> tuple[float, float]:
        """Run a step; return its seconds and its loss."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{peer.schedule} {peer.n_microbatches}\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            answers.append([float(word) for word in process.stdout.readline().split()])
        return max(seconds for seconds, _ in answers), next(loss for _, loss in answers if loss == loss)

    def close(self) -> None:
        """End both."""
        for process in self.processes:
            process.communicate()


def study(name: str, rounds: int, screening: int, n_finalists: int) -> Result:
    """Plan a model within its limit, try all peers, and run the fastest in turn with the plan."""
    model, x, y = models()[name]
    loss_fn = LOSSES.get(name, F.cross_entropy)
    tell(name, "what one device needs")
    alone_bytes = least_alone_bytes(model, x)
    limit_bytes = float(int(SHARE * alone_bytes))
    said = refusals(model, x, limit_bytes)
    tell(name, "stages for the peers")
    # Before compiling: a pipeline moves parameters into one block of memory, and pickling one would pickle all of it.
    splits = {n_stages: equal_stages(model, x, n_stages) for n_stages in (2, 4)}
    peers_bytes = cloudpickle.dumps((splits, x, y, loss_fn))
    tell(name, f"planning within {limit_bytes:,.0f} bytes")
    peers = [Peer(schedule, count) for schedule in PEERS for count in COUNTS]
    with (
        tempfile.TemporaryDirectory() as folder,
        stagecut.compile(
            model,
            ["cpu", "cpu"],
            loss_fn=loss_fn,
            memory_bytes=limit_bytes,
            threads_per_worker=1,
            example_inputs=(x,),
        ) as pm,
    ):
        Path(folder, "peers.pkl").write_bytes(peers_bytes)
        ranks = Ranks(folder)

        def ours() -> tuple[float, float]:
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            loss = pm.step(x, target=y).loss
            return time.perf_counter() - start, float(loss)

        try:
            tell(name, "all peers in turn")
            screened, _ = in_turn(ranks, peers, screening)
            finalists = sorted(peers, key=lambda peer: statistics.median(screened[peer]))[:n_finalists]
            tell(name, "the fastest in turn with stagecut")
            times, mine = in_turn(ranks, finalists, rounds, ours)
        finally:
            ranks.close()
        plan = pm.plan
    medians = {peer: statistics.median(times[peer]) for peer in finalists}
    best = min(medians, key=medians.__getitem__)
    low, middle, high = statistics.quantiles([a / b for a, b in zip(mine, times[best])], n=4)
    again = sum(stage.recompute for stage in plan.stages)
    return Result(
        model=name,
        limit_bytes=limit_bytes,
        alone_bytes=alone_bytes,
        plan=f"{len(plan.stages)} stages, {plan.schedule}, {plan.n_microbatches} microbatches, {again} recomputed",
        planned_bytes=max(stage.device_bytes for stage in plan.stages),
        refusals=said,
        predicted_s=plan.prediction.step_s,
        measured_s=statistics.median(mine),
        screened_s={str(peer): statistics.median(values) for peer, values in screened.items()},
        peers_s={str(peer): medians[peer] for peer in sorted(medians, key=medians.__getitem__)},
        ratio=(low, middle, high),
    )


def tell(name: str, what: str) -> None:
    """Say what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {name}: {what}", file=sys.stderr, flush=True)


def in_turn(
    ranks: Ranks, peers: Sequence[Peer], rounds: int, ours: Any = None
) -> tuple[Mapping[Peer, list[float]], list[float]]:
    """Run every contestant once a round; return the seconds of the peers and of ``ours``, first rounds left out.

    Raises:
        ValueError: a peer has another loss than ours, or than the other peers.
    """
    times: dict[Peer, list[float]] = {peer: [] for peer in peers}
    mine: list[float] = []
    for round_ in range(rounds + _WARM_UP):
        losses = []
        if ours is not None:
            seconds, loss = ours()
            losses.append(loss)
            if round_ >= _WARM_UP:
                mine.append(seconds)
        for peer in peers:
            seconds, loss = ranks.step(peer)
            losses.append(loss)
            if round_ >= _WARM_UP:
                times[peer].append(seconds)
        # Statistics of batches in microbatches of other sizes differ, and so does the loss behind a BatchNorm.
        if max(losses) - min(losses) > 0.1 * max(losses):
            raise ValueError(f"the contestants do not compute the same: losses {losses}")
    return times, mine


def table(results: Sequence[Result]) -> str:
    """Write the results as a Markdown table."""
    lines = [
        "| model | one device needs | limit | planner's choice (fullest stage) | stagecut | best peer | "
        "stagecut / best peer (quartiles) |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        peer, peer_s = next(iter(r.peers_s.items()))
        lines.append(
            f"| {r.model} | {r.alone_bytes / 2**20:.0f} MiB | {r.limit_bytes / 2**20:.0f} MiB | "
            f"{r.plan} ({r.planned_bytes / 2**20:.0f} MiB) | {r.measured_s * 1e3:.1f} ms | "
            f"{peer}: {peer_s * 1e3:.1f} ms | {r.ratio[1]:.3f} ({r.ratio[0]:.3f} to {r.ratio[2]:.3f}) |"
        )
    lines += ["", "| schedule of torch.distributed.pipelining, all in turn | " + " | ".join(r.model for r in results)]
    lines[-1] += " |"
    lines.append("|---" * (1 + len(results)) + "|")
    for peer in results[0].screened_s:
        cells = (f"{r.screened_s[peer] * 1e3:.1f} ms" for r in results)
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Study the chosen models and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="with the fastest peers")
    parser.add_argument("--screening", type=int, default=5, help="rounds with all peers")
    parser.add_argument("--finalists", type=int, default=3, help="peers that go on")
    parser.add_argument("--model", action="append", choices=["transformer", "resnet50", "mlp"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: list[Result] = []
    for name in options.model or ["transformer", "mlp", "resnet50"]:
        results.append(study(name, options.rounds, options.screening, options.finalists))
        for what, error in results[-1].refusals.items():
            print(f"{name}, {what}: {error}\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(table(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        serve(int(sys.argv[2]), sys.argv[3])
    else:
        main()
