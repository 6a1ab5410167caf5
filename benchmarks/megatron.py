"""Predicted throughput of Megatron-LM's published runs, in Megatron's configuration and in the planner's own.

The runs are those of table 1 of Narayanan et al., 2021 (https://arxiv.org/abs/2104.04473): GPT models of 1.7 to 1,008
billion parameters on 32 to 3,072 GPUs of DGX A100. A tensor-parallel group of t GPUs is described as one device: t
times the rates, the memory and the network cards of one. What the tensor-parallel all-reduces take is added to the
stages of the plan by a formula. Nothing here needs a GPU:

    python benchmarks/megatron.py                    # Megatron's configurations
    python benchmarks/megatron.py --free             # and what the planner chooses, which takes minutes
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stagecut
from stagecut.models.transformer import GPT
from stagecut.partitioner.cluster import Link
from stagecut.partitioner.devices import GIB, known_device
from stagecut.partitioner.plan import Plan
from stagecut.partitioner.predict import predict_column
from stagecut.partitioner.simulate import StepCosts, simulate
from stagecut.runtime.instructions import Action, Layout
from stagecut.runtime.program import lower

SEQUENCE, VOCABULARY = 2048, 51200
GPU = known_device("A100-80GB")
GPUS_PER_HOST = 8
# A plan counts parameters, gradients and two moments in bfloat16, 8 bytes a parameter; training in mixed precision
# keeps the moments and a copy of the parameters in float32 beside bfloat16 parameters and gradients: 16 bytes.
MASTER_BYTES = 8 / 2  # more, per byte of bfloat16 parameters
_MOST_TIGHTENINGS = 4


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        billions: parameters; ``hidden``, ``layers``, ``heads``: the model.
        tensor: GPUs of a tensor-parallel group; ``stages``: of the pipeline; ``chunks``: per stage, if interleaved.
        gpus, batch: all GPUs, and the rows of the batch.
        rows: of a microbatch. Like ``chunks`` these are not in the paper but in ``examples/sc21/run_table_1.sh`` of
            Megatron-LM's repository.
        published: achieved TFLOP/s per GPU.
    """

    billions: float
    hidden: int
    layers: int
    heads: int
    tensor: int
    stages: int
    gpus: int
    batch: int
    rows: int
    chunks: int
    published: float

    @property
    def replicas(self) -> int:
        """Count the data-parallel replicas."""
        return self.gpus // (self.tensor * self.stages)

    @property
    def microbatches(self) -> int:
        """Count the microbatches of a replica."""
        return self.batch // (self.replicas * self.rows)

    def tflops(self, step_s: float) -> float:
        """Return TFLOP/s per GPU, counted as the paper does (3): with one more forward in the backward."""
        h, s, layers = self.hidden, SEQUENCE, self.layers
        flops = 96 * self.batch * s * layers * h * h * (1 + s / (6 * h) + VOCABULARY / (16 * layers * h))
        return flops / step_s / self.gpus / 1e12


RUNS = (
    Run(1.7, 2304, 24, 24, 1, 1, 32, 512, 16, 1, 137),
    Run(3.6, 3072, 30, 32, 2, 1, 64, 512, 16, 1, 138),
    Run(7.5, 4096, 36, 32, 4, 1, 128, 512, 16, 1, 142),
    Run(18.4, 6144, 40, 48, 8, 1, 256, 1024, 8, 1, 135),
    Run(39.1, 8192, 48, 64, 8, 2, 512, 1536, 4, 1, 138),
    Run(76.1, 10240, 60, 80, 8, 4, 1024, 1792, 2, 3, 140),
    Run(145.6, 12288, 80, 96, 8, 8, 1536, 2304, 2, 2, 148),
    Run(310.1, 16384, 96, 128, 8, 16, 1920, 2160, 1, 2, 155),
    Run(529.6, 20480, 105, 128, 8, 35, 2520, 2520, 1, 3, 163),
    Run(1008.0, 25600, 128, 160, 8, 64, 3072, 3072, 1, 1, 163),
)


@dataclass(frozen=True)
class Row:
    """What was predicted for a run.

    Attributes:
        billions, gpus, published: of the run.
        plain_tflops: Megatron's configuration under 1F1B, without tensor-parallel communication.
        one_f_one_b_tflops: the same with it.
        megatron_tflops: the same with Megatron's schedule, which is interleaved where the run has chunks.
        shape: ``stages x replicas, rows of a microbatch`` that the planner chose, "" if it was not asked.
        free_plain_tflops, free_tflops: its plan without and with tensor-parallel communication.
        recomputed: stages that it recomputes.
        gib: memory per GPU that its fullest stage takes in mixed precision.
        plan_s: seconds that it took.
    """

    billions: float
    gpus: int
    published: float
    plain_tflops: float
    one_f_one_b_tflops: float
    megatron_tflops: float
    shape: str = ""
    free_plain_tflops: float = 0.0
    free_tflops: float = 0.0
    recomputed: int = 0
    gib: float = 0.0
    plan_s: float = 0.0


def described(run: Run, n_groups: int) -> str:
    """Describe so many tensor-parallel groups of hosts of eight GPUs, each as one device, in the format of a file."""
    t, kind = run.tensor, GPU.kind
    rates = ", ".join(f"{dtype} = {t * rate}" for dtype, rate in kind.flops_per_s.items())
    per_host = min(n_groups, GPUS_PER_HOST // t)
    return f"""
[kinds.group]
flops_per_s = {{ {rates} }}
bytes_per_s = {t * kind.bytes_per_s}
memory_gib = {t * kind.memory_bytes / GIB}
kernel_overhead_s = {kind.kernel_overhead_s}
[[hosts]]
devices = {{ group = {per_host} }}
count = {n_groups // per_host}
link = {{ bytes_per_s = {t * GPU.inside.bytes_per_s}, latency_s = {GPU.inside.latency_s} }}
[between]
bytes_per_s = {t * GPU.between.bytes_per_s}
latency_s = {GPU.between.latency_s}
"""


def plan(run: Run, n_groups: int, **wishes: Any) -> Plan:
    """Plan the run's model and batch for so many groups."""
    with torch.device("meta"):
        model: nn.Module = GPT(VOCABULARY, run.hidden, run.layers, run.heads, SEQUENCE, tied=False).bfloat16()
        tokens = torch.zeros(run.batch, SEQUENCE, dtype=torch.long)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cluster.toml")
        path.write_text(described(run, n_groups))
        return stagecut.plan(model, str(path), example_inputs=(tokens,), costs="analytic", **wishes)


def megatron_plan(run: Run, chunks: int = 1) -> Plan:
    """Plan Megatron's configuration: its stages (each in so many chunks), replicas, microbatches, and recompute.

    Megatron recomputes layer by layer, which takes as long as by stage and holds less: memory is not limited here.
    Every chunk has a device of its own in this plan; :func:`interleaved_s` puts those of a stage on one.
    """
    return plan(
        run,
        run.stages * chunks * run.replicas,
        stages=run.stages * chunks,
        replicas=run.replicas,
        microbatches=run.microbatches,
        schedule="1f1b",
        recompute=True,
        memory_bytes=2.0**60,
    )


def free_plan(run: Run) -> Plan:
    """Let the planner choose all but the tensor-parallel groups, until its plan fits in mixed precision too."""
    limit = run.tensor * GPU.kind.memory_bytes
    asked = limit
    for _ in range(_MOST_TIGHTENINGS):
        found = plan(run, run.gpus // run.tensor, memory_bytes=asked)
        over = max(mixed_precision_bytes(found)) - limit
        if over <= 0:
            return found
        asked -= over
    raise ValueError(f"{run.billions} B: no plan that fits in mixed precision in {_MOST_TIGHTENINGS} attempts")


def mixed_precision_bytes(plan: Plan) -> list[float]:
    """Return what each stage holds with parameters and moments in float32 beside those that it computes with."""
    return [stage.memory_bytes + MASTER_BYTES * stage.parameter_bytes for stage in plan.stages]


def all_reduce_s(run: Run, rows: int) -> float:
    """Return the seconds of a ring all-reduce of one layer's output over a tensor-parallel group, by NVLink.

    Patarasuk and Yuan, 2009 (https://doi.org/10.1016/j.jpdc.2008.09.002).
    """
    t, n_bytes = run.tensor, rows * SEQUENCE * run.hidden * 2
    return 2 * (t - 1) / t * n_bytes / GPU.inside.bytes_per_s + 2 * (t - 1) * GPU.inside.latency_s


def with_all_reduces(run: Run, plan: Plan) -> Plan:
    """Add to every stage what its layers' all-reduces take: two in a forward, two in a backward (section 2.3)."""
    rows = -(-run.batch // (plan.n_microbatches * plan.layout().n_replicas))
    seconds = 2 * all_reduce_s(run, rows)
    stages = []
    for stage in plan.stages:
        # A layer may be cut in two; both its products that end in an all-reduce have names of their own.
        n_halves = sum(
            op.stage == stage.index and op.module_path.endswith((".attention.out", ".feed_forward.2"))
            for op in plan.ops
        )
        forward_s = n_halves / 2 * seconds
        again = 2 if stage.recompute else 1
        stages.append(
            replace(stage, forward_s=stage.forward_s + forward_s, backward_s=stage.backward_s + again * forward_s)
        )
    assert run.tensor == 1 or any(new.forward_s > old.forward_s for new, old in zip(stages, plan.stages))
    return replace(plan, stages=tuple(stages))


def interleaved_order(n_workers: int, n_chunks: int, n_microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Return Megatron's interleaved 1F1B (section 2.2): worker w has the stages w, w + n_workers, ...

    Raises:
        ValueError: the microbatches are no multiple of the workers.
    """
    if n_microbatches % n_workers:
        raise ValueError(f"{n_microbatches} microbatches are no multiple of {n_workers} workers")
    n_actions = n_chunks * n_microbatches

    def action(kind: str, worker: int, number: int) -> Action:
        turn, place = divmod(number, n_workers * n_chunks)
        chunk, member = divmod(place, n_workers)
        chunk = chunk if kind == "F" else n_chunks - 1 - chunk
        return Action(kind, chunk * n_workers + worker, turn * n_workers + member)

    orders = []
    for worker in range(n_workers):
        held = min(n_actions, 2 * (n_workers - worker - 1) + (n_chunks - 1) * n_workers)
        order = [action("F", worker, number) for number in range(held)]
        for number in range(n_actions - held):
            order += [action("F", worker, held + number), action("B", worker, number)]
        orders.append(tuple(order + [action("B", worker, number) for number in range(n_actions - held, n_actions)]))
    return tuple(orders)


def interleaved_s(plan: Plan, n_workers: int) -> float:
    """Simulate a plan whose stages are chunks, dealt out to so many workers; one replica stands for all."""
    wires = plan.layout()
    n_chunks = len(plan.stages) // n_workers
    layout = Layout(tuple((s % n_workers,) for s in range(len(plan.stages))), wires.wires, wires.gradient_wires)
    packets: dict[tuple[int, int], float] = {}
    for wire in plan.wires:
        for target in wire.targets:
            packets[wire.source, target] = packets.get((wire.source, target), 0.0) + wire.n_bytes
    order = interleaved_order(n_workers, n_chunks, plan.n_microbatches)
    costs = StepCosts(
        forward_s=tuple(stage.forward_s for stage in plan.stages),
        backward_s=tuple(stage.backward_s for stage in plan.stages),
        packet_bytes=packets,
        link=Link(0.0, float("inf"), "not used"),
        links={(r.source, r.target): Link(r.latency_s, r.bytes_per_s, "plan") for r in plan.timing.links},
        reduce_s=plan.timing.reduce_s,
        reduce_buckets=plan.timing.reduce_buckets,
    )
    return simulate(lower("interleaved", layout, order, plan.n_microbatches), costs).makespan_s


def predicted(run: Run, free: bool) -> Row:
    """Predict a run in Megatron's configuration, and in the planner's if asked."""
    plain = megatron_plan(run)
    given = with_all_reduces(run, plain)
    plain_tflops = run.tflops(plain.prediction.step_s)
    one_f_one_b = megatron = run.tflops(predict_column(given).makespan_s)
    if run.chunks > 1:
        chunked = with_all_reduces(run, megatron_plan(run, run.chunks))
        megatron = run.tflops(interleaved_s(chunked, run.stages))
    row = Row(run.billions, run.gpus, run.published, plain_tflops, one_f_one_b, megatron)
    if not free:
        return row
    start = time.perf_counter()
    chosen = free_plan(run)
    seconds = time.perf_counter() - start
    n_replicas = [len(stage.devices) for stage in chosen.stages]
    rows = -(-run.batch // (chosen.n_microbatches * max(n_replicas)))
    return replace(
        row,
        shape=f"{len(n_replicas)} x {max(n_replicas)}, {rows}",
        free_plain_tflops=run.tflops(chosen.prediction.step_s),
        free_tflops=run.tflops(predict_column(with_all_reduces(run, chosen)).makespan_s),
        recomputed=sum(stage.recompute for stage in chosen.stages),
        gib=max(mixed_precision_bytes(chosen)) / GIB / run.tensor,
        plan_s=seconds,
    )


def table(rows: list[Row], runs: dict[float, Run]) -> str:
    """Write the rows as a Markdown table."""
    lines = [
        "| parameters | GPUs | t x p x d, rows | published | compute and pipeline only | with tensor-parallel "
        "all-reduces | with Megatron's schedule | predicted / published | planner: p x d, rows (stages recomputed) | "
        "compute and pipeline only | with all-reduces | GiB a GPU | planned in |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        run = runs[row.billions]
        chunks = f", {run.chunks} chunks" if run.chunks > 1 else ""
        free = ["", "", "", "", ""]
        if row.shape:
            free = [
                f"{row.shape} ({row.recomputed})",
                f"{row.free_plain_tflops:.0f}",
                f"{row.free_tflops:.0f}",
                f"{row.gib:.0f}",
                f"{row.plan_s:.0f} s",
            ]
        cells = [
            f"{row.billions:g} B",
            f"{row.gpus:,}",
            f"{run.tensor} x {run.stages} x {run.replicas}, {run.rows}{chunks}",
            f"{row.published:.0f}",
            f"{row.plain_tflops:.0f}",
            f"{row.one_f_one_b_tflops:.0f}",
            f"{row.megatron_tflops:.0f}",
            f"{row.megatron_tflops / row.published:.2f}",
            *free,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Predict the chosen runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {run.billions: run for run in RUNS}
    parser.add_argument("--size", action="append", type=float, choices=list(known), help="billions of parameters")
    parser.add_argument("--free", action="store_true", help="let the planner choose too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for size in options.size or known:
        rows.append(predicted(known[size], options.free))
        print(f"{size:g} B: {rows[-1]}", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows, known))


if __name__ == "__main__":
    main()
