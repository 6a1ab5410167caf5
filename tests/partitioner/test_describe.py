"""From what a user writes to a cluster."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stagecut import DeviceError
from stagecut.partitioner import describe as describe_module
from stagecut.partitioner.cpu import cpu_link, machine_memory_bytes, usable_cores
from stagecut.partitioner.describe import describe
from stagecut.partitioner.devices import GIB, known_device


@pytest.mark.parametrize(
    ("devices", "replicas", "groups"),
    [
        (["cpu"] * 4, None, None),
        ("cpu, cpu,cpu,cpu", None, None),
        (["cpu"] * 4, 1, ((0,), (1,), (2,), (3,))),
        (["cpu"] * 4, 2, ((0, 1), (2, 3))),
        (["cpu"] * 4, [3, 1], ((0, 1, 2), (3,))),
        ([["cpu", "cpu"], "cpu", ["cpu"]], None, ((0, 1), (2,), (3,))),
        ("sim:4xA100", None, None),
        ("sim:4xA100", [1, 3], ((0,), (1, 2, 3))),
        ("sim:2x2xA100", 2, ((0, 1), (2, 3))),
    ],
)
def test_stages_are_fixed_by_nesting_or_by_replicas_and_else_free(devices: Any, replicas: Any, groups: Any) -> None:
    cluster = describe(devices, replicas)
    assert cluster.groups == groups
    assert cluster.n_devices == 4


@pytest.mark.parametrize(
    ("devices", "replicas", "words"),
    [
        ([], None, "devices is empty"),
        ([[], ["cpu"]], None, "a stage has no device"),
        ([["cpu"], ["cpu"]], 2, "not both"),
        ([["cpu"], ["cpu"]], 1, "not both"),
        (["cpu"] * 3, 2, "3 devices do not divide into stages of 2"),
        (["cpu"] * 3, 0, "do not divide"),
        (["cpu"] * 3, [1, 1], r"replicas=\[1, 1\] names 2 devices, and 3 were given"),
        (["cpu"] * 3, [3, 0], "every stage has at least one"),
        (["cpu"] * 3, [], "names 0 devices"),
        (["nonsense"], None, "is no device"),
        (["cuda:99"], None, "is not there"),
        ("sim:0xA100", None, "has no devices"),
        ("sim:0x8xA100", None, "has no devices"),
        ("sim:8xZ80", None, "describes no cluster; known kinds: A100-40GB"),
        ("sim:A100", None, r"'A100' is not of the form \[HOSTSx\]COUNTxKIND\[-MEMORYGB\]"),
        ("sim:8xA100+", None, "'' is not of the form"),
        ("sim:8xA100-80", None, "is not of the form"),
        ("sim:3xA100", 2, "do not divide"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(devices: Any, replicas: Any, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        describe(devices, replicas)


def test_cpu_workers_share_the_memory_and_the_cores_of_their_machine() -> None:
    cluster = describe(["cpu"] * 4)
    (kind,) = cluster.kinds
    assert kind.name == "cpu"
    assert kind.memory_bytes == machine_memory_bytes() / 4
    assert cluster.n_cores == usable_cores()
    assert cluster.link(0, 3) == cpu_link()
    assert not cluster.simulated


def test_a_memory_limit_holds_for_every_worker() -> None:
    for devices in (["cpu", "cpu"], "sim:2xA100+2xV100"):
        assert {kind.memory_bytes for kind in describe(devices, memory_bytes=123).kinds} == {123}


def test_a_spec_counts_hosts_and_devices() -> None:
    one, four = describe("sim:8xH100-80GB"), describe("sim:4x8xA100-40GB")
    assert one.names == tuple(f"H100:{i}" for i in range(8))
    assert {device.host for device in one.devices} == {0}
    assert four.names[8:10] == ("host1/A100:0", "host1/A100:1")
    assert [device.host for device in four.devices] == [h for h in range(4) for _ in range(8)]
    assert four.link(0, 7).bytes_per_s > four.link(7, 8).bytes_per_s
    assert four.kinds[0].memory_bytes == 40 * GIB
    assert one.simulated
    assert one.n_cores is None


def test_hosts_of_a_spec_may_differ() -> None:
    cluster = describe("sim:8xA100+8xV100-32GB")
    ampere, volta = known_device("A100"), known_device("V100", 32)
    assert [kind.name for kind in cluster.kinds] == ["A100-80GB", "V100-32GB"]
    assert cluster.names[7:9] == ("host0/A100:7", "host1/V100:0")
    assert cluster.link(0, 1) == ampere.inside
    assert cluster.link(8, 9) == volta.inside
    assert cluster.link(7, 8) == volta.between


def test_devices_of_one_list_have_kinds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"cuda:0": "A100", "cuda:1": "L4"}
    monkeypatch.setattr(describe_module, "_name", str)
    monkeypatch.setattr(describe_module, "_accelerator", lambda name: known_device(there[name]))
    cluster = describe(["cuda:0", "cpu", "cuda:1"])
    assert [device.kind.name for device in cluster.devices] == ["A100-80GB", "cpu", "L4-24GB"]
    assert cluster.inside == cpu_link()
    assert cluster.n_cores == usable_cores()
    assert describe(["cuda:0", "cuda:1"]).inside == known_device("L4").inside
    assert describe(["cuda:0"]).n_cores is None


@pytest.mark.parametrize(
    ("product", "memory_gib", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80GB"),
        ("Tesla V100-SXM2-16GB", 15.8, "V100-16GB"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100-32GB"),
        ("NVIDIA H200", 139.8, "H200-141GB"),
        ("NVIDIA L4", 22.0, "L4-24GB"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX4090-24GB"),
        ("NVIDIA L40S", 44.5, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.75, None),
    ],
)
def test_accelerators_are_found_by_what_the_driver_calls_them(
    product: str, memory_gib: float, name: str | None
) -> None:
    found = describe_module._by_product_name(product, int(memory_gib * GIB))
    assert (found and found.kind.name) == name


def test_an_accelerator_that_is_not_in_the_table_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "NVIDIA T4", 15 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    with pytest.warns(UserWarning, match=r"cuda:0 is NVIDIA T4, whose speed is not known; it is taken for an A100"):
        known = describe_module._accelerator("cuda:0")
    assert known.kind.memory_bytes == 15 * GIB
    assert known.kind.source.startswith("NVIDIA T4 taken for an A100-80GB")
