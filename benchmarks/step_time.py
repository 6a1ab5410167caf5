"""Step time and memory of stagecut beside torch.distributed.pipelining: same stages, schedules and microbatches.

Three models, two workers with one thread each, every schedule that both have. The two run in turn, some steps each,
with one process of one thread that runs the unsplit model in the same microbatches, with one that runs it in one piece,
and with two that have half of these microbatches each and nothing to do with each other. Reported is the median over
the rounds of stagecut's step over theirs, and with ``--fused`` and ``--onednn`` of the same pipeline's with
gradient_accumulation_fusion and with onednn_matmul, which take part too. "Ideal" is (one process, same microbatches) /
2 / (1 - bubble), where the bubble is the schedule's with stages of equal time; the "ideal of these stages" has the
bubble that stages of their own measured time leave, the loss on the last one: parts of one graph that the peer can run
are not equal. The stages are those of the shortest step that were found (same_stages.py). "Two at once" is what each of
the two processes takes over half of what the one takes that has the work of both: what is above 1 is the machine's,
whose two cores are slower together, and no schedule's; "ideal of two at once" is theirs / (1 - bubble). Then what two
such processes take over one with the whole batch in one piece, data parallelism beside plain DDP, and two stages of two
replicas each beside DDP over four processes. Run on an otherwise idle machine, up to an hour a model:

    python benchmarks/step_time.py --model transformer
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from plain import Plain
from same_stages import Stages, timeline
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.models.transformer import GPT, next_token_loss
from stagecut.partitioner.loss import Loss
from stagecut.partitioner.plan import Plan
from stagecut.vision_compat import import_torchvision

CHAIN, LOOP, VEE = ((0,), (1,)), ((0,), (1,), (0,), (1,)), ((0,), (1,), (1,), (0,))
# The peer's name for each schedule, and the worker of each stage.
SCHEDULES: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "fill-drain": ("ScheduleGPipe", CHAIN),
    "1f1b": ("Schedule1F1B", CHAIN),
    "looped-breadth-first": ("ScheduleLoopedBFS", LOOP),
    "interleaved-1f1b": ("ScheduleInterleaved1F1B", LOOP),
    "interleaved-zero-bubble": ("ScheduleInterleavedZeroBubble", LOOP),
    "zb-v": ("ScheduleZBVZeroBubble", VEE),
    "dualpipe-v": ("ScheduleDualPipeV", VEE),
}
COUNTS = (4, 8, 16)
VARIANTS = {"fused": "gradient_accumulation_fusion", "onednn": "onednn_matmul"}  # options of compile
_STEPS = 2  # of each in a round
_WARM_UP = 4  # a signature is recorded when it has come up twice
_ALONE = ("pieces", "whole", "pair")  # the unsplit model, which has nothing to prepare after its first step


@dataclass(frozen=True)
class Case:
    """A model, its batch and its loss."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    loss_fn: Callable[..., torch.Tensor]

    def half(self) -> Case:
        """Return the same with half of the batch."""
        rows = len(self.x) // 2
        return Case(self.model, self.x[:rows].clone(), self.y[:rows].clone(), self.loss_fn)


def cases(name: str) -> Case:
    """Make a model by name, with its batch."""
    if name == "transformer":
        model = GPT(1024, 256, 8, 8, 128, tied=False)  # the peer cannot have one weight on two stages
        return Case(model, torch.randint(1024, (32, 128)), torch.randint(1024, (32, 128)), next_token_loss)
    if name == "resnet50":
        import_torchvision()
        from torchvision.models import resnet50

        return Case(resnet50(), torch.randn(32, 3, 64, 64), torch.randint(1000, (32,)), F.cross_entropy)
    model = nn.Sequential(*(layer for _ in range(200) for layer in (nn.Linear(64, 64), nn.ReLU())))
    for layer in model[::2]:
        nn.init.kaiming_normal_(
            layer.weight, nonlinearity="relu"
        )  # else gradients become subnormal: slow for everybody
    return Case(model, torch.randn(128, 64), torch.randn(128, 64), F.mse_loss)


@dataclass(frozen=True)
class Variant:
    """The same pipeline with another option: over the peer by round, as in a row, and over the others.

    Attributes:
        over_peer: lower quartile, median, upper quartile.
        over_ideal, over_pair, over_whole: as in a row.
    """

    over_peer: tuple[float, float, float]
    over_ideal: float
    over_pair: float
    over_whole: float


@dataclass
class Row:
    """What one schedule took with one count of microbatches.

    Attributes:
        ours_s, peer_s, pieces_s, whole_s, pair_s: medians of stagecut, the peer, one process with the same
            microbatches, one process with the batch in one piece, and two at once with half of the microbatches each.
        over_peer: stagecut over the peer by round: lower quartile, median, upper quartile.
        over_ideal, over_pair, over_whole: medians by round; over the ideal of one process with the same microbatches,
            over that of two at once, and over one process with the batch in one piece.
        two_at_once: the median by round of two at once over half of one process with the same microbatches.
        unequal: the ideal of stages of these times over that of equal ones.
        stages: per stage, its first op, and the seconds of its forward and backward that were measured.
        ours_bytes, peer_bytes: the larger peak of resident memory of the two workers.
        variants: by name, the same with another option.
    """

    schedule: str
    n_microbatches: int
    ours_s: float
    peer_s: float
    pieces_s: float
    whole_s: float
    pair_s: float
    two_at_once: float
    over_peer: tuple[float, float, float]
    over_ideal: float
    over_pair: float
    over_whole: float
    ours_bytes: int
    peer_bytes: int
    unequal: float
    stages: tuple[tuple[str, float], ...]
    variants: dict[str, Variant]


def serve(run: Callable[[], None]) -> None:
    """Run and time one step for every line on stdin."""
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        gc.collect()  # zero-bubble schedules of the peer leave their graphs in cycles
        print(seconds, flush=True)


def peer(rank: int, folder: str) -> tuple[Callable[[], None], dict[int, nn.Module]]:
    """Be one rank of torch.distributed.pipelining; return what runs a step, and this rank's stages."""
    import torch.distributed as dist
    from torch.distributed import pipelining

    torch.set_num_threads(1)
    import_torchvision()
    name, count, groups, modules, case = pickle.loads(Path(folder, "peers.pkl").read_bytes())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = [s for s, (worker,) in enumerate(groups) if worker == rank]
    stages = [pipelining.PipelineStage(modules[s], s, len(groups), torch.device("cpu")) for s in mine]
    given = stages if len(stages) > 1 else stages[0]
    runner = getattr(pipelining.schedules, name)(given, count, loss_fn=case.loss_fn)
    inputs = (case.x,) if 0 in mine else ()
    results = {"target": case.y, "losses": []} if len(groups) - 1 in mine else {}

    def run() -> None:
        for s in mine:
            modules[s].zero_grad(set_to_none=True)
        runner.step(*inputs, **results)

    return run, {s: modules[s] for s in mine}


def single(path: str, n_microbatches: int) -> None:
    """Be the unsplit model in one process with one thread, in microbatches or in one piece."""
    torch.set_num_threads(1)
    import_torchvision()
    case = pickle.loads(Path(path).read_bytes())

    def run() -> None:
        case.model.zero_grad(set_to_none=True)
        for xs, ys in zip(case.x.chunk(n_microbatches), case.y.chunk(n_microbatches)):
            (case.loss_fn(case.model(xs), ys) / n_microbatches).backward()

    serve(run)


def hand_to_peer(folder: str, plan: Plan, stages: Stages, case: Case) -> None:
    """Write what its two ranks read."""
    name, groups = SCHEDULES[plan.schedule]
    given = (name, plan.n_microbatches, groups, stages.modules(plan), case)
    Path(folder, "peers.pkl").write_bytes(cloudpickle.dumps(given))


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
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{commands[0]} did not run")

    def step(self) -> float:
        """Run a step on all processes."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return max(float(process.stdout.readline()) for process in self.processes if process.stdout is not None)

    def peak_bytes(self) -> int:
        """Return the peak of resident memory of the fullest process."""
        return max(peak_bytes(process.pid) for process in self.processes)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.communicate()


def alone(case: Case, folder: str, n_microbatches: int, n_processes: int = 1) -> Other:
    """Return processes that run the unsplit model each by itself, all of them at once."""
    handle, path = tempfile.mkstemp(dir=folder)
    with open(handle, "wb") as file:
        cloudpickle.dump(case, file)
    return Other(*[["--single", str(n_microbatches), path]] * n_processes)


def peak_bytes(pid: int) -> int:
    """Read a process's peak of resident memory, pages that it shares included."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def timed(pm: stagecut.Pipeline, case: Case) -> float:
    """Run one step of a pipeline."""
    pm.model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    pm.step(case.x, target=case.y)
    return time.perf_counter() - start


def in_turn(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run some steps of each, round by round; return the seconds of the median step of each round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for who, step in contestants.items():
        for _ in range(0 if who in _ALONE else _WARM_UP):
            step()
    for _ in range(rounds):
        for name, step in contestants.items():
            step()  # its memory was not used for a while
            times[name].append(statistics.median(step() for _ in range(_STEPS)))
    return times


def quartiles(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of the ratios of two contestants, round by round."""
    low, middle, high = statistics.quantiles([x / y for x, y in zip(a, b)], n=4)
    return low, middle, high


def bubble_of(plan: Plan, equal: bool = True) -> float:
    """Return the share of the step in which workers idle under the plan's schedule.

    Nothing but compute takes time: in stages of equal times, or of the times that they were measured to take.
    """
    groups = plan.layout().workers
    own = [(stage.forward_s, stage.backward_s, stage.backward_weight_s) for stage in plan.stages]
    seconds = [(1.0, 2.0, 1.0)] * len(groups) if equal else own
    return timeline(plan.schedule, groups, plan.n_microbatches)(seconds).bubble


def _first_op(plan: Plan, s: int) -> str:
    return next(op.name for op in plan.ops if op.stage == s)


@contextmanager
def ours(case: Case, plan: Plan, **wishes: Any) -> Iterator[tuple[Callable[[], float], list[int]]]:
    """Compile the plan, on workers of its own; give what runs a step, and the workers' processes."""
    with stagecut.compile(
        copy.deepcopy(case.model), ["cpu", "cpu"], loss_fn=case.loss_fn, plan=plan, threads_per_worker=1, **wishes
    ) as pm:
        timed(pm, case)
        yield lambda: timed(pm, case), [worker.pid for worker in pm.stats().workers]


def study(case: Case, stages: Stages, name: str, count: int, rounds: int, variants: Sequence[str]) -> Row:
    """Run one schedule with one count of microbatches, everybody in turn."""
    plan = stages.plan(SCHEDULES[name][1], name, count)
    with tempfile.TemporaryDirectory() as folder:
        hand_to_peer(folder, plan, stages, case)
        others = {
            "peer": Other(["--peer", "0", folder], ["--peer", "1", folder]),
            "pieces": alone(case, folder, count),
            "whole": alone(case, folder, 1),
            "pair": alone(case.half(), folder, count // 2, 2),
        }
        stagecut.end_workers()  # new ones, whose peak of memory is this pipeline's
        with ours(case, plan) as (step, workers), ExitStack() as stack:
            contestants = {"ours": step, **{who: other.step for who, other in others.items()}}
            for variant in variants:
                contestants[variant], _ = stack.enter_context(ours(case, plan, **{VARIANTS[variant]: True}))
            times = in_turn(contestants, rounds)
            ours_bytes = max(map(peak_bytes, workers))
            peers_bytes = others["peer"].peak_bytes()
        for other in others.values():
            other.close()
    medians = {who: statistics.median(values) for who, values in times.items()}

    def compared(who: str) -> Variant:
        over = {other: quartiles(times[who], times[other]) for other in others}
        busy = 1 - bubble_of(plan)
        return Variant(over["peer"], over["pieces"][1] * 2 * busy, over["pair"][1] * busy, over["whole"][1])

    found = compared("ours")
    return Row(
        name,
        count,
        medians["ours"],
        medians["peer"],
        medians["pieces"],
        medians["whole"],
        medians["pair"],
        quartiles(times["pair"], times["pieces"])[1] * 2,
        found.over_peer,
        found.over_ideal,
        found.over_pair,
        found.over_whole,
        ours_bytes,
        peers_bytes,
        (1 - bubble_of(plan)) / (1 - bubble_of(plan, equal=False)),
        tuple((_first_op(plan, s), stage.forward_s + stage.backward_s) for s, stage in enumerate(plan.stages)),
        {variant: compared(variant) for variant in variants},
    )


def replicas(case: Case, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Compare data parallelism, and two stages of two replicas each, with DDP over as many processes of one thread."""
    found = {}
    asked: dict[str, dict[str, Any]] = {
        "2 replicas over DDP with 2 processes": {"devices": ["cpu"] * 2, "replicas": 2, "microbatches": 1},
        "2 stages x 2 replicas over DDP with 4 processes": {"devices": ["cpu"] * 4, "replicas": 2, "schedule": "1f1b"},
    }
    for what, wishes in asked.items():
        ddp = Plain(case.model, case.x, case.y, case.loss_fn, len(wishes["devices"]), 1)
        with stagecut.compile(copy.deepcopy(case.model), loss_fn=case.loss_fn, threads_per_worker=1, **wishes) as pm:
            times = in_turn({"ours": lambda pm=pm: timed(pm, case), "ddp": ddp.step}, rounds)  # type: ignore[misc]
        ddp.close()
        found[what] = quartiles(times["ours"], times["ddp"])
    return found


def machine(case: Case, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Compare two processes, which have nothing to do with each other, with one that does the work of both.

    Two stages can be no faster than two processes that never wait: where these take more than half as long as one, it
    is the machine that has no two whole cores for them.
    """
    with tempfile.TemporaryDirectory() as folder:
        contestants = {
            "whole": alone(case, folder, 1),
            "one half": alone(case.half(), folder, 1),
            "two halves": alone(case.half(), folder, 1, 2),
        }
        times = in_turn({who: other.step for who, other in contestants.items()}, rounds)
        for other in contestants.values():
            other.close()
    return {
        "One process with half of the batch over one with the whole": quartiles(times["one half"], times["whole"]),
        "Two such processes at once over one with the whole": quartiles(times["two halves"], times["whole"]),
    }


def table(rows: Sequence[Row]) -> str:
    """Write the rows as a Markdown table."""
    titles = ["schedule", "microbatches", "stagecut", "peer", "stagecut / peer (quartiles)", "/ ideal"]
    titles += ["/ ideal of these stages", "two at once", "/ ideal of two at once", "/ one process, whole batch"]
    titles += ["peak memory of a worker: stagecut", "peer"]
    for variant in rows[0].variants:
        titles += [f"{variant} / peer (quartiles)", "/ ideal", "/ ideal of two at once", "/ one process, whole batch"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in rows:
        cells = [r.schedule, str(r.n_microbatches), f"{r.ours_s * 1e3:.1f} ms", f"{r.peer_s * 1e3:.1f} ms"]
        cells += [_spread(r.over_peer), f"{r.over_ideal:.3f}"]
        cells += [f"{r.over_ideal / r.unequal:.3f}", f"{r.two_at_once:.3f}"]
        cells += [f"{r.over_pair:.3f}", f"{r.over_whole:.3f}"]
        cells += [f"{r.ours_bytes / 2**20:.0f} MiB", f"{r.peer_bytes / 2**20:.0f} MiB"]
        for own in r.variants.values():
            cells += [_spread(own.over_peer), f"{own.over_ideal:.3f}", f"{own.over_pair:.3f}", f"{own.over_whole:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(found: tuple[float, float, float]) -> str:
    low, middle, high = found
    return f"**{middle:.3f}** ({low:.3f} to {high:.3f})"


def main() -> None:
    """Run the chosen model, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["transformer", "resnet50", "mlp"], required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--schedule", action="append", choices=list(SCHEDULES))
    parser.add_argument("--microbatches", action="append", type=int)
    for variant, option in VARIANTS.items():
        parser.add_argument(f"--{variant}", action="store_true", help=f"with {option} too")
    parser.add_argument("--data-parallel", action="store_true", help="only that, and what the machine has for two")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if any(count < 2 or count % 2 for count in options.microbatches or ()):
        parser.error("--microbatches takes even counts: two processes share them")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = cases(options.model)
    rows: list[Row] = []
    variants = [variant for variant in VARIANTS if getattr(options, variant)]
    for count in [] if options.data_parallel else options.microbatches or COUNTS:
        stages = Stages(case.model, case.x, case.x.shape[0] // count, Loss(case.loss_fn, case.y, case.x.shape[0]))
        for name in options.schedule or SCHEDULES:
            rows.append(study(case, stages, name, count, options.rounds, variants))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if rows:
        print(table(rows), flush=True)
    if not options.schedule:
        for study_of in (machine, replicas):
            for what, (low, middle, high) in study_of(case, options.rounds).items():
                print(f"{what}: {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        serve(peer(int(sys.argv[2]), sys.argv[3])[0])
    elif sys.argv[1:2] == ["--single"]:
        single(sys.argv[3], int(sys.argv[2]))
    else:
        main()
