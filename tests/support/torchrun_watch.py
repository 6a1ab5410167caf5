"""Run by tests/runtime/watch/test_torchrun.py on both ranks: counts, findings, slow workers, bundles and forks."""

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spoiled import N_MICROBATCHES, batch, spoiled, stage_of_spoil

import stagecut

torch.set_num_threads(1)
N_STEPS = 40  # a slow one is told after ten in a row; the machine may hold the other worker up now and then


def slow_worker(rank: int) -> None:
    pm = spoiled("spin", "torchrun", n_stages=2)
    x, y = batch(marked=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(N_STEPS):
            pm.step(x, target=y)
    told = [str(w.message) for w in caught if " is slow: " in str(w.message)]
    assert len(told) == (rank == 0), told
    assert all(f"worker {pm.plan.stage_of['spoil']} is slow" in text and "pm.save(" in text for text in told)
    stats = pm.stats()
    sent = N_STEPS * N_MICROBATCHES
    assert [(w.worker, w.n_steps, w.n_sent) for w in stats.workers] == [(w, N_STEPS, sent) for w in (0, 1)]
    assert stats.workers[rank].pid == os.getpid()
    assert len({w.pid for w in stats.workers}) == 2
    assert sum(w.sent_bytes for w in stats.workers) == sum(w.received_bytes for w in stats.workers) > 0
    assert all(w.memory_bytes for w in stats.workers)
    pm.close()


def not_finite(rank: int, kind: str, check: str, phase: str) -> None:
    pm = spoiled(kind, "torchrun", n_stages=2, n_before=6, check_finite=check)
    assert stage_of_spoil(pm) == 1
    x, y = batch(marked=True)
    for call in (lambda: pm.step(x, target=y), lambda: torch.nn.functional.cross_entropy(pm(x), y).backward()):
        if check == "loss" and pm.stats().n_calls:
            break  # the loss of a loop of one's own is one's own
        with pytest.raises(stagecut.NonFiniteError) as caught:
            call()
        error = caught.value
        assert (error.stage, error.microbatch, error.phase) == (1, 2, phase), (rank, str(error))
    pm.zero_grad()
    x, y = batch(marked=False)
    assert pm.verify(x, target=y).ok
    pm.close()


def bundles(rank: int, folder: Path) -> None:
    os.environ["STAGECUT_TRACE"] = str(folder)
    pm = spoiled("none", "torchrun", n_stages=2)
    x, y = batch(marked=False)
    pm.step(x, target=y)
    child = os.fork()
    if child == 0:
        for call in (pm.state_dict, pm.stats, lambda: pm.clip_grad_norm_(1.0), lambda: pm.step(x, target=y)):
            try:
                call()
            except stagecut.StagecutError as error:
                if "forked from process" in str(error):
                    continue
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(stagecut.ShapeError) as caught:
        pm.step(x + rank, target=y)
    del os.environ["STAGECUT_TRACE"]
    (path,) = folder.glob(f"*-rank{rank}-{os.getpid()}-*.json")
    assert any(str(path) in note for note in caught.value.__notes__)
    found = json.loads(path.read_text())
    assert [w["worker"] for w in found["workers"]] == [0, 1]
    assert (found["workers"][rank]["position"] is None, found["workers"][1 - rank]["position"] is None) == (False, True)
    assert [w["worker"] for w in found["stats"]["workers"]] == [rank]


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    slow_worker(rank)
    not_finite(rank, "nan", "boundaries", "forward")
    not_finite(rank, "gradient", "boundaries", "backward")
    not_finite(rank, "nan", "loss", "loss")
    bundles(rank, Path(sys.argv[1]))
    print(f"rank {rank} is watched", flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


main()
