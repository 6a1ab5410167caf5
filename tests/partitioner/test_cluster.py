"""Clusters: kinds, links, hosts, groups."""

from __future__ import annotations

import pytest
import torch

from stagecut import DeviceError
from stagecut.partitioner.cluster import Cluster, Device, DeviceKind, Link, slowest
from stagecut.partitioner.cluster_spec import cluster_of_spec
from stagecut.partitioner.devices import known_device

FAST = DeviceKind("fast", {"float32": 2e12, "bfloat16": 8e12}, 1e12, 1e-6, 8e9, "made up")
SLOW = DeviceKind("slow", {"float32": 1e12}, 1e11, 1e-6, 4e9, "made up")
NEAR, FAR, NARROW = Link(1e-6, 1e11, "made up"), Link(1e-5, 1e9, "made up"), Link(1e-6, 1e10, "made up")
PAIRS = Cluster(tuple(Device(f"d{i}", FAST if i < 2 else SLOW, host=i // 2) for i in range(4)), None, NEAR, FAR)


@pytest.mark.parametrize(
    ("kind", "dtype", "rate"),
    [
        (FAST, torch.bfloat16, 8e12),
        (FAST, "float16", 8e12),
        (FAST, torch.complex64, 2e12),
        (FAST, torch.float64, 2e12),
        (SLOW, torch.bfloat16, 1e12),
        (DeviceKind("odd", {"float64": 3.0, "bfloat16": 5.0}, 1, 0, 1, ""), torch.float32, 3.0),
    ],
)
def test_a_dtype_without_a_rate_has_the_rate_of_the_nearest(
    kind: DeviceKind, dtype: torch.dtype | str, rate: float
) -> None:
    assert kind.rate(dtype) == rate


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sim:999999999999xA100", "describes more than 100,000 devices"),
        ("sim:99999999x8xA100", "describes more than 100,000 devices"),
        ("sim:100000xA100+1xA100", "describes more than 100,000 devices"),
        (f"sim:{'9' * 5000}xA100", "describes more than 100,000 devices"),
        ("sim:2xA100-0GB", "'A100' has no such memory"),
        (f"sim:2xA100-{'9' * 400}GB", "is not of the form"),
    ],
)
def test_counts_that_no_plan_can_be_for_are_refused(text: str, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        cluster_of_spec(text)


@pytest.mark.parametrize("name", ["A100-0GB", f"A100-{'9' * 5000}GB"])
def test_a_device_without_or_with_any_memory_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="has no such memory"):
        known_device(name)


def test_as_many_devices_as_may_be_are_described_quickly() -> None:
    assert len(cluster_of_spec("sim:12500x8xA100").devices) == 100_000


def test_clusters_and_kinds_can_be_keys() -> None:
    assert {PAIRS: 1, PAIRS.with_groups(None): 2} == {PAIRS: 2}
    assert PAIRS.kinds == (FAST, SLOW)


def test_a_message_takes_the_link_inside_its_host_or_between_hosts() -> None:
    assert PAIRS.link(0, 1) == PAIRS.link(3, 2) == NEAR
    assert PAIRS.link(1, 2) == FAR
    assert PAIRS.slowest_link([0, 1]) == NEAR
    assert PAIRS.slowest_link([0]) == NEAR
    assert PAIRS.slowest_link(range(4)) == FAR
    assert NEAR.seconds(1e11) == pytest.approx(1.000001)


def test_hosts_may_have_links_of_their_own() -> None:
    cluster = Cluster(PAIRS.devices, None, NARROW, NEAR, host_links=(NEAR, NARROW))
    assert (cluster.link(0, 1), cluster.link(2, 3)) == (NEAR, NARROW)
    assert cluster.slowest_link([0, 1]) == NEAR
    assert cluster.slowest_link([0, 2]) == NEAR
    assert cluster.slowest_link([0, 2, 3]) == NARROW


def test_the_slowest_link_has_the_fewest_bytes_per_second_then_the_longest_latency() -> None:
    late = Link(1.0, 1e9, "")
    assert slowest([NEAR, FAR, late, NARROW]) == late


def test_without_groups_every_device_is_a_stage() -> None:
    assert PAIRS.groups is None
    assert PAIRS.stages == (("d0",), ("d1",), ("d2",), ("d3",))
    assert (PAIRS.n_stages, PAIRS.n_devices, PAIRS.names) == (4, 4, ("d0", "d1", "d2", "d3"))


def test_groups_order_the_workers_stage_by_stage() -> None:
    cluster = PAIRS.with_groups([[2], [0, 1]])
    assert cluster.stages == (("d2",), ("d0", "d1"))
    assert cluster.groups == ((0,), (1, 2))
    assert cluster.names == ("d2", "d0", "d1")
    assert [device.host for device in cluster.devices] == [1, 0, 0]
    assert cluster.with_groups(None).stages == (("d2",), ("d0",), ("d1",))


def test_a_device_may_own_several_stages() -> None:
    cluster = PAIRS.with_groups([[3], [1], [3]])
    assert cluster.names == ("d3", "d1")
    assert cluster.stages == (("d3",), ("d1",), ("d3",))


@pytest.mark.parametrize(
    ("groups", "words"),
    [([], "no device"), ([[0], []], "no device"), ([[0], [4]], "stage 1 names device 4"), ([[1, 1]], "twice")],
)
def test_groups_that_make_no_sense_are_refused(groups: list[list[int]], words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        PAIRS.with_groups(groups)
