"""The published runs are consistent, and what the benchmark adds to plans is what its formulas say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from megatron import (
    GPU,
    RUNS,
    SEQUENCE,
    VOCABULARY,
    Run,
    all_reduce_s,
    described,
    interleaved_order,
    mixed_precision_bytes,
    plan,
    with_all_reduces,
)

from stagecut.partitioner.cluster import Link
from stagecut.partitioner.cluster_file import cluster_of_file
from stagecut.partitioner.simulate import StepCosts, simulate
from stagecut.runtime.instructions import Layout
from stagecut.runtime.program import lower

SMALL = Run(0.0, 64, 4, 2, 2, 2, 8, 16, 4, 1, 1.0)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.billions:g}B")
def test_sizes_and_batches_of_the_published_runs_add_up(run: Run) -> None:
    h, layers = run.hidden, run.layers
    parameters = 12 * layers * h * h * (1 + 13 / (12 * h) + (VOCABULARY + SEQUENCE) / (12 * layers * h))
    assert round(parameters / 1e9, 1) == run.billions
    assert run.gpus == run.tensor * run.stages * run.replicas
    assert run.batch == run.replicas * run.microbatches * run.rows
    assert run.layers % (run.stages * run.chunks) == 0
    assert run.chunks == 1 or run.microbatches % run.stages == 0


def test_a_group_is_one_device_with_its_share_of_hosts(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(described(RUNS[2], 32))
    cluster = cluster_of_file(str(path))
    assert [device.host for device in cluster.devices] == [number // 2 for number in range(32)]
    assert cluster.devices[0].kind.rate(torch.bfloat16) == pytest.approx(4 * 156e12)
    assert cluster.devices[0].kind.memory_bytes == 4 * GPU.kind.memory_bytes
    assert cluster.link(0, 2).bytes_per_s == pytest.approx(4 * 20e9)


@pytest.mark.parametrize(("n_workers", "n_chunks", "n_microbatches"), [(2, 2, 4), (4, 3, 8), (3, 2, 3), (4, 1, 8)])
def test_interleaving_divides_the_bubble_by_the_chunks(n_workers: int, n_chunks: int, n_microbatches: int) -> None:
    n_stages = n_workers * n_chunks
    wires = tuple((s, s + 1) for s in range(n_stages - 1))
    layout = Layout(tuple((s % n_workers,) for s in range(n_stages)), wires, wires)
    order = interleaved_order(n_workers, n_chunks, n_microbatches)
    assert all(len(set(actions)) == len(actions) == 2 * n_chunks * n_microbatches for actions in order)
    program = lower("interleaved", layout, order, n_microbatches)
    costs = StepCosts((1.0,) * n_stages, (2.0,) * n_stages, {}, Link(0.0, float("inf"), "none"))
    assert simulate(program, costs).makespan_s == pytest.approx(3 * (n_chunks * n_microbatches + n_workers - 1))


def test_interleaving_needs_whole_rounds() -> None:
    with pytest.raises(ValueError, match="5 microbatches are no multiple of 2"):
        interleaved_order(2, 2, 5)


def test_an_all_reduce_is_worked_out_by_hand() -> None:
    run = RUNS[3]  # 8 GPUs, 6144 wide
    assert all_reduce_s(run, 8) == pytest.approx(1.75 * 8 * 2048 * 6144 * 2 / 240e9 + 14 * 10e-6)
    assert all_reduce_s(RUNS[0], 16) == 0.0


@pytest.mark.parametrize("recompute", [False, True])
def test_every_layer_reduces_twice_in_each_direction(recompute: bool) -> None:
    wishes = {"stages": 2, "replicas": 2, "microbatches": 2, "schedule": "1f1b", "recompute": recompute}
    plain = plan(SMALL, 4, **wishes)
    given = with_all_reduces(SMALL, plain)
    added = [
        sum(getattr(new, what) - getattr(old, what) for new, old in zip(given.stages, plain.stages))
        for what in ("forward_s", "backward_s")
    ]
    forward_s = 4 * 2 * all_reduce_s(SMALL, 4)
    assert added == pytest.approx([forward_s, (2 if recompute else 1) * forward_s])


def test_mixed_precision_holds_sixteen_bytes_a_parameter() -> None:
    planned = plan(SMALL, 4, stages=2, replicas=2, microbatches=2, schedule="1f1b")
    for stage, n_bytes in zip(planned.stages, mixed_precision_bytes(planned)):
        assert n_bytes - stage.memory_bytes == 8 * stage.parameter_bytes / 2
