"""pm.stats(): what workers did, as plain data that adds up."""

from __future__ import annotations

import json
import os

import psutil
import pytest
import torch
from spoiled import N_MICROBATCHES, ROWS, batch, spoiled
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.records import from_json, to_json
from stagecut.runtime.watch.residents import resident

pytestmark = pytest.mark.usefixtures("no_workers_left")


@pytest.mark.parametrize("launch", ["inline", "local"])
def test_counts_of_workers_fit_together(launch: str) -> None:
    with spoiled("none", launch) as pm:
        x, y = batch(marked=False)
        before = pm.stats()
        assert (before.n_steps, before.n_calls, before.step_s) == (0, 0, None)
        assert before.predicted_step_s == pm.plan.prediction.step_s
        for _ in range(3):
            pm.step(x, target=y)
        F.cross_entropy(pm(x), y).backward()
        pm.evaluate(x, target=y)
        stats = pm.stats()
        assert (stats.n_steps, stats.n_calls, stats.n_restarts) == (4, 6, 0)
        assert [w.worker for w in stats.workers] == [0, 1, 2]
        assert [w.n_steps for w in stats.workers] == [4, 4, 4]
        # Of six calls five send values along, and four send gradients back, over each of two boundaries.
        assert [w.n_sent for w in stats.workers] == [5 * N_MICROBATCHES, 9 * N_MICROBATCHES, 4 * N_MICROBATCHES]
        assert [w.n_received for w in stats.workers] == [4 * N_MICROBATCHES, 9 * N_MICROBATCHES, 5 * N_MICROBATCHES]
        assert sum(w.sent_bytes for w in stats.workers) == sum(w.received_bytes for w in stats.workers)
        assert stats.workers[0].sent_bytes > 5 * ROWS * 4 * 4  # float32 activations of width 4, and headers
        for worker in stats.workers:
            assert worker.busy_s > 0
            assert worker.waiting_s >= 0
            assert worker.step_s is not None
            assert stats.step_s is not None
            assert 0 < worker.step_s <= 2 * stats.step_s + 1.0
            assert worker.peak_memory_bytes >= worker.memory_bytes > 1 << 24  # type: ignore[operator]
        pids = {w.pid for w in stats.workers}
        if launch == "inline":
            assert pids == {os.getpid()}
        else:
            assert len(pids) == 3
            assert pids <= {child.pid for child in psutil.Process().children()}
        assert from_json(stagecut.Stats, json.loads(json.dumps(to_json(stats)))) == stats
        lines = str(stats).splitlines()
        assert lines[0].startswith("4 steps in 6 calls, median step ")
        assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2"]
    assert pm.stats().workers[1].n_sent == stats.workers[1].n_sent, "what was counted stays, the processes are gone"
    assert pm.stats().workers[1].pid is None


def test_a_worker_whose_packets_come_late_waits_for_them() -> None:
    with spoiled("spin", "local", n_stages=2) as pm:
        x, y = batch(marked=False)
        for _ in range(2):
            pm.step(x, target=y)
        slow = pm.plan.stage_of["spoil"]
        waited = []
        for _ in range(10):  # the machine may hold the other worker up for as long, but not in every step
            before = pm.stats().workers
            pm.step(x, target=y)
            after = pm.stats().workers
            assert after[slow].busy_s - before[slow].busy_s >= N_MICROBATCHES * 0.02
            waited.append(after[1 - slow].waiting_s - before[1 - slow].waiting_s)
        assert max(waited) >= 0.02


def test_replicas_say_how_long_they_summed() -> None:
    torch.manual_seed(0)
    with stagecut.compile(
        nn.Linear(4, 4), [["cpu", "cpu"]], loss_fn=F.cross_entropy, microbatches=1, costs="analytic"
    ) as pm:
        x, y = batch(marked=False)
        pm.step(x, target=y)
        stats = pm.stats()
    assert [w.n_sent for w in stats.workers] == [0, 0]
    assert all(w.reduce_s > 0 for w in stats.workers)


def test_restarts_are_counted_and_counts_go_on() -> None:
    with spoiled("raise", "inline") as pm:
        x, y = batch(marked=True)
        with pytest.raises(ZeroDivisionError):
            pm.step(x, target=y)
        pm.restart()
        x, y = batch(marked=False)
        pm.step(x, target=y)
        stats = pm.stats()
    assert (stats.n_steps, stats.n_restarts) == (1, 1)


def test_without_a_plan_there_is_nothing_to_tell() -> None:
    with stagecut.compile(nn.Linear(4, 4), ["cpu"], launch="inline") as pm:
        stats = pm.stats()
    assert (stats.n_steps, stats.predicted_step_s, stats.workers) == (0, None, ())
    assert "no step timed yet" in str(stats)


def test_a_process_that_is_gone_has_no_memory() -> None:
    own = resident("cpu")
    assert own.pid == os.getpid()
    process = psutil.Popen(["true"])
    process.wait()
    assert resident("cpu", process.pid).memory_bytes is None
