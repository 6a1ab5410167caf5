"""Packets whose bodies go from device to device: which do, and that what arrives is what was sent.

There is no pair of GPUs here: gloo carries the bodies between CPU workers, by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from dag_models import RandomChooser, draw_case, worst_error
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.runtime import launch
from stagecut.runtime.direct import direct_pairs, groups_of
from stagecut.runtime.packets import DevicePacket, decode, pack

A0, A1, B0, CPU = ("a", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:0"), ("a", "cpu")


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ([A0, A1], [(0, 1), (1, 0)]),
        ([A0, B0], [(0, 1), (1, 0)]),  # two machines
        ([A0, A0], []),  # which NCCL refuses
        ([A0, CPU], []),
        ([CPU, CPU], []),
        ([("a", "xpu:0"), ("a", "xpu:1")], []),
    ],
)
def test_only_different_devices_of_a_kind_that_has_a_backend(
    places: list[tuple[str, str]], wanted: list[tuple[int, int]]
) -> None:
    assert direct_pairs([(0, 1), (1, 0)], places) == wanted


def test_every_worker_makes_one_group_for_both_ways_in_the_same_order() -> None:
    made = []
    pairs = [(0, 1), (1, 0), (1, 2), (2, 1), (0, 3)]
    groups_of(pairs, [A0, A1, B0, CPU], lambda ranks, backend: made.append((ranks, backend)))
    assert made == [([0, 1], "nccl"), ([1, 2], "nccl")]


def test_head_and_body_are_the_packet() -> None:
    values = [torch.arange(6.0).view(2, 3).T, (torch.tensor([1, 2]), None), 3, torch.tensor(True), torch.ones(0, 2)]
    packed = pack(values, [True, False, False, False, False])
    packet = DevicePacket.of(packed.header, torch.device("cpu"))
    packet.body.copy_(packed.write_body(torch.zeros(packed.n_bytes, dtype=torch.uint8)))
    found, wanted = decode(packet, torch.device("cpu"))
    assert torch.equal(found[0], values[0])
    assert found[0].stride() == values[0].stride()
    assert torch.equal(found[1][0], values[1][0])
    assert found[1][1] is None
    assert (found[2], bool(found[3]), tuple(found[4].shape)) == (3, True, (0, 2))
    assert wanted == [True, False, False, False, False]
    assert packet.numel() == packed.n_bytes


@pytest.fixture(scope="module")
def _over_gloo() -> Iterator[None]:
    stagecut.end_workers()
    boot = launch._BOOT.replace("from {module}", "import direct_over_gloo; from {module}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_BOOT", boot)
        yield
    stagecut.end_workers()


@pytest.mark.usefixtures("_over_gloo")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", [0, 3, 4, 7, 11, 12])
def test_random_models_with_bodies_of_their_own(seed: int) -> None:
    case = draw_case(RandomChooser(seed), max_stages=4, replicas=(1, 2))
    with stagecut.compile(case.model, list(case.plan.devices), loss_fn=case.loss, plan=case.plan, timeout_s=30) as pm:
        for _ in range(2):
            pm.zero_grad()
            loss = pm.step(*case.args, target=case.target, **case.kwargs).loss
            assert worst_error(case, loss) <= 1e-10


@pytest.mark.usefixtures("_over_gloo")
@pytest.mark.parametrize("schedule", ["1f1b", "fill-drain", "zb-v", "interleaved-1f1b"])
def test_schedules_whose_packets_cross_both_ways(schedule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(8))).double()
    with stagecut.compile(
        model,
        ["cpu", "cpu"],
        loss_fn=F.mse_loss,
        schedule=schedule,
        stages=4 if schedule in ("zb-v", "interleaved-1f1b") else 2,
        microbatches=6,
        costs="analytic",
        timeout_s=30,
    ) as pm:
        x, y = torch.randn(2, 24, 16, dtype=torch.float64)
        assert pm.verify(x, target=y).ok
        assert pm.verify(x[:7], target=y[:7]).ok
        F.mse_loss(pm(x), y).backward()
        assert pm.evaluate(x).output.shape == (24, 16)
