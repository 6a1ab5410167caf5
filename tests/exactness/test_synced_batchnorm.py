"""BatchNorm with statistics over replicas: what the unsplit model does with the rows that they have at one time."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.runtime.batch import piece_sizes
from stagecut.runtime.synced import Exchange, SyncedBatchNorm

pytestmark = [pytest.mark.usefixtures("no_workers_left"), pytest.mark.filterwarnings("ignore::UserWarning")]


def made() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    return nn.Sequential(
        *layers, nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3), nn.BatchNorm1d(3, affine=False)
    ).double()


def step_of(model: nn.Module, x: torch.Tensor, target: torch.Tensor, sizes: list[int], n_replicas: int) -> torch.Tensor:
    """Add the gradients of the batch, in rounds of ``n_replicas`` pieces; return the loss."""
    total = torch.zeros((), dtype=x.dtype)
    rounds = [sum(sizes[k : k + n_replicas]) for k in range(0, len(sizes), n_replicas)]
    for rows, wanted in zip(x.split(rounds), target.split(rounds)):
        loss = F.cross_entropy(model(rows), wanted) * (len(rows) / len(x))
        loss.backward()
        total += loss.detach()
    return total


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        ([["cpu", "cpu"], ["cpu", "cpu"]], {"schedule": "1f1b"}),
        ([["cpu", "cpu"], ["cpu", "cpu"]], {"schedule": "zb-h1"}),
        ([["cpu", "cpu", "cpu"]], {"recompute": True}),
        ([["cpu"], ["cpu"]], {"schedule": "1f1b"}),
    ],
    ids=str,
)
def test_gradients_and_statistics_are_those_of_rounds(devices: list[list[str]], options: dict[str, Any]) -> None:
    n_replicas = len(devices[0])
    model = made()
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    wishes = {"microbatches": 2, "costs": "analytic", "batchnorm": "sync", "threads_per_worker": 1, **options}
    with stagecut.compile(model, devices, loss_fn=F.cross_entropy, **wishes) as pm:
        for n_rows in (12, 12, 11, 5, 12):  # of 5 some replicas have no second microbatch
            x, target = torch.randn(n_rows, 2, 4, 4, dtype=torch.float64), torch.randint(3, (n_rows,))
            pm.zero_grad()
            plain.zero_grad()
            loss = pm.step(x, target=target).loss
            sizes = piece_sizes(n_rows, 2 * n_replicas)
            wanted = step_of(plain, x, target, sizes, n_replicas)
            torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
            for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13, msg=name)
            for (name, buffer), other in zip(model.named_buffers(), plain.buffers()):
                torch.testing.assert_close(buffer, other, rtol=1e-10, atol=1e-12, msg=name)
            assert pm.verify(x, target=target).worst <= 1e-10
            F.cross_entropy(pm(x), target).backward()
            step_of(plain, x, target, sizes, n_replicas)
            for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13, msg=name)
        model.eval()
        plain.eval()
        pm.eval()
        torch.testing.assert_close(pm.evaluate(x).output, plain(x).detach())


def test_a_microbatch_without_weight_still_counts_for_the_others() -> None:
    """Its rows are in the statistics, and its replica takes part in the backward of the round."""
    model = made()

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target, ignore_index=-1)

    x, target = torch.randn(12, 2, 4, 4, dtype=torch.float64), torch.randint(3, (12,))
    target[3:6] = -1  # the first microbatch of the second replica: a mean over nothing
    wishes = {"microbatches": 2, "costs": "analytic", "batchnorm": "sync", "loss_weight": lambda t: (t >= 0).sum()}
    with stagecut.compile(model, [["cpu", "cpu"], ["cpu", "cpu"]], loss_fn=loss_fn, schedule="1f1b", **wishes) as pm:
        assert pm.verify(x, target=target).worst <= 1e-10
        loss = pm.step(x, target=target).loss
    plain = made()
    sums = sum(
        F.cross_entropy(plain(rows), wanted, ignore_index=-1, reduction="sum")
        for rows, wanted in zip(x.chunk(2), target.chunk(2))
    )
    torch.testing.assert_close(loss, sums.detach() / 9, rtol=1e-12, atol=0)  # type: ignore[union-attr]


def test_what_cannot_be_synced_is_refused() -> None:
    x = torch.randn(12, 2, 4, 4, dtype=torch.float64)
    options: dict[str, Any] = {"batchnorm": "sync", "example_inputs": (x,), "costs": "analytic", "microbatches": 2}
    with pytest.raises(stagecut.ConstraintError, match=r"their numbers differ: stage 0 has 2, stage 1 has 1"):
        stagecut.compile(made(), [["cpu", "cpu"], ["cpu"]], **options)
    with pytest.raises(stagecut.ConstraintError, match="launch='inline' runs them one after another"):
        stagecut.compile(made(), [["cpu", "cpu"]], launch="inline", **options)
    with_dropout = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    options["example_inputs"] = (x[:, 0, 0],)
    with stagecut.compile(with_dropout, [["cpu", "cpu"]], loss_fn=F.mse_loss, **options) as pm:
        pm.step(x[:, 0, 0], target=x[:, 0, 0])
        with pytest.raises(stagecut.StagecutError, match="random numbers belong to single microbatches"):
            pm.verify(x[:, 0, 0], target=x[:, 0, 0])


class Meeting:
    """Exchanges rows between threads of one process."""

    def __init__(self, n: int) -> None:
        self.rows: list[torch.Tensor] = [torch.empty(0)] * n
        self.barrier = threading.Barrier(n, timeout=30)

    def of(self, replica: int) -> Exchange:
        def exchange(row: torch.Tensor) -> list[torch.Tensor]:
            self.rows[replica] = row.clone()
            self.barrier.wait()
            found = list(self.rows)
            self.barrier.wait()
            return found

        return exchange


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    spatial=st.lists(st.integers(1, 3), max_size=2),
    affine=st.booleans(),
    tracked=st.booleans(),
    momentum=st.sampled_from([0.1, None]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 100),
)
def test_replicas_do_together_what_one_norm_does(
    sizes: list[int],
    spatial: list[int],
    affine: bool,
    tracked: bool,
    momentum: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[len(spatial)]
    norm = kind(3, affine=affine, track_running_stats=tracked, momentum=momentum)
    if dtype is torch.float64:
        norm = norm.double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = (torch.randn(sum(sizes), 3, *spatial, dtype=torch.float64) * 3 + 1).to(dtype).requires_grad_()
    grown = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    copies = [copy.deepcopy(norm) for _ in sizes]
    if x.numel() // 3 == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            SyncedBatchNorm(norm, lambda: Meeting(1).of(0))(x)
        return
    wanted = norm(x)
    wanted.backward(grown)
    meeting = Meeting(len(sizes))
    parts = [part.detach().requires_grad_() for part in x.split(sizes)]
    found: list[Any] = [None] * len(sizes)

    def replica(index: int) -> None:
        synced = SyncedBatchNorm(copies[index], lambda: meeting.of(index))
        found[index] = synced(parts[index])
        found[index].backward(grown.split(sizes)[index])

    threads = [threading.Thread(target=replica, args=(index,)) for index in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rtol = {torch.float64: 1e-9, torch.float32: 2e-3}[dtype]
    near = {"rtol": rtol, "atol": rtol / 10 if dtype is not torch.float64 else 1e-11}
    torch.testing.assert_close(torch.cat(found), wanted, **near)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), x.grad, **near)  # type: ignore[arg-type, misc]
    for name, parameter in norm.named_parameters():
        total = torch.stack([copied.get_parameter(name).grad for copied in copies]).sum(0)  # type: ignore[misc]
        torch.testing.assert_close(total, parameter.grad, **near)  # type: ignore[arg-type]
    for copied in copies:
        for (name, buffer), other in zip(copied.named_buffers(), norm.buffers()):
            torch.testing.assert_close(buffer, other, msg=name, **near)  # type: ignore[arg-type]


def test_half_precision_is_normalised_in_single() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    x, grown = torch.randn(64, 4).bfloat16(), torch.randn(64, 4).bfloat16()
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = copy.deepcopy(norm)(first)
    wanted.backward(grown)
    found = SyncedBatchNorm(norm, lambda: Meeting(1).of(0))(second)
    found.backward(grown)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(second.grad, first.grad, rtol=2e-2, atol=2e-2)
