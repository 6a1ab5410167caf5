"""Clusters in a TOML file, and what is wrong with one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import stagecut
from stagecut import DeviceError
from stagecut.partitioner.describe import describe
from stagecut.partitioner.devices import GIB, KERNEL_OVERHEAD_S, known_device

KIND = """
[kinds.small]
flops_per_s = { float32 = 9e12, bfloat16 = 60e12 }
bytes_per_s = 0.4e12
memory_gib = 16
"""
LINK = "{ bytes_per_s = 2e9, latency_s = 1e-5 }"


def written(folder: Path, text: str) -> str:
    path = folder / "cluster.toml"
    path.write_text(text)
    return str(path)


def test_the_example_of_the_document_is_planned_for(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs" / "clusters.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    path = written(tmp_path, example)
    cluster = describe(path)
    assert [(kind.name, kind.memory_bytes / GIB) for kind in cluster.kinds] == [("A100-40GB", 40), ("small", 16)]
    assert cluster.names == tuple(
        [f"host{h}/A100:{i}" for h in range(2) for i in range(4)] + ["host2/small:0", "host2/small:1"]
    )
    assert cluster.simulated
    assert cluster.link(0, 3) == known_device("A100").inside
    assert cluster.link(8, 9).bytes_per_s == 10e9
    assert cluster.link(3, 4).bytes_per_s == cluster.link(0, 9).bytes_per_s == 12.5e9
    plan = stagecut.plan(
        nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)]), path, example_inputs=(torch.randn(40, 4),), replicas=5
    )
    assert len(plan.stages) == 2


def test_one_device_of_a_kind_of_ones_own_needs_no_link(tmp_path: Path) -> None:
    cluster = describe(written(tmp_path, KIND + "[[hosts]]\ndevices = { small = 1 }\n"), memory_bytes=7)
    (kind,) = cluster.kinds
    assert (kind.rate(torch.bfloat16), kind.rate(torch.float32)) == (60e12, 9e12)
    assert (kind.memory_bytes, kind.kernel_overhead_s) == (7, KERNEL_OVERHEAD_S)
    assert kind.source.endswith("cluster.toml, kinds.small")


HOST = "[[hosts]]\ndevices = { small = 2 }\nlink = " + LINK + "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hosts = ", "is not TOML"),
        ("", "hosts is missing; expected one \\[\\[hosts\\]\\] table or more"),
        ("hosts = 3", "hosts is 3; expected one"),
        (HOST, r"hosts\[0\].devices.small is no known device and no table of kinds; expected one of A100-40GB"),
        (KIND + HOST + "color = 1", r"hosts\[0\].color is not known; expected one of devices, count, link"),
        ("speed = 1\n" + KIND + HOST, "speed is not known; expected one of kinds, hosts, between"),
        (KIND + "watts = 5\n" + HOST, "kinds.small.watts is not known"),
        (KIND.replace("= 16", "= 0") + HOST, "kinds.small.memory_gib is 0; expected GiB of memory, above 0"),
        (KIND.replace("= 16", "= true") + HOST, "kinds.small.memory_gib is True"),
        (KIND.replace("0.4e12", "inf") + HOST, "kinds.small.bytes_per_s is inf"),
        (KIND.replace("bytes_per_s", "#") + HOST, "kinds.small.bytes_per_s is missing; expected bytes of memory"),
        (KIND.replace("flops_per_s", "#") + HOST, "kinds.small.flops_per_s is missing; expected a table of rates"),
        (KIND.replace("float32", "single") + HOST, "kinds.small.flops_per_s.single is no dtype of torch"),
        (KIND.replace("9e12", "'fast'") + HOST, "kinds.small.flops_per_s.float32 is 'fast'; expected operations"),
        (KIND + "kernel_overhead_s = -1\n" + HOST, "kernel_overhead_s is -1; expected seconds, 0 or more"),
        (KIND + "source = 1\n" + HOST, "kinds.small.source is 1; expected a string"),
        (KIND.replace("small", "A100") + HOST, "kinds.A100 is a device of the table already"),
        ("kinds = 3\n" + HOST, "kinds is 3; expected a table"),
        ("[kinds]\nsmall = 3\n" + HOST, "kinds.small is 3; expected a table"),
        (KIND + "[[hosts]]\ncount = 2", r"hosts\[0\].devices is missing; expected a table of counts"),
        (KIND + "[[hosts]]\ndevices = { small = 0 }", r"hosts\[0\].devices.small is 0; expected a whole number, 1"),
        (KIND + HOST + "count = 1.5", r"hosts\[0\].count is 1.5; expected a whole number"),
        (KIND + "[[hosts]]\ndevices = { small = 2 }", r"hosts\[0\].link is missing; expected the link between its"),
        (KIND + HOST + "count = 2", "between is missing; expected the link between hosts"),
        (KIND + HOST.replace("latency_s = 1e-5", "latency = 1"), r"hosts\[0\].link.latency is not known"),
        (KIND + HOST.replace(", latency_s = 1e-5", ""), r"hosts\[0\].link.latency_s is missing; expected seconds"),
        ("deep = " + "[" * 5000 + "]" * 5000, "is not TOML: maximum recursion depth"),
        ("count = " + "1" * 5000, "is not TOML: Exceeds the limit"),
        (KIND.replace("= 16", "= 1" + "0" * 400) + HOST, "kinds.small.memory_gib is 10000"),
        (KIND.replace("= 16", "= 1e305") + HOST, r"kinds.small.memory_gib is 1e\+305; expected GiB"),
        (KIND + "[[hosts]]\ndevices = { small = 10000000000 }", r"hosts\[0\] describes more than 100,000 devices"),
        (KIND + HOST + "count = 100000000", r"hosts\[0\] describes more than 100,000 devices"),
        (KIND + HOST.replace("2e9", "0"), r"hosts\[0\].link.bytes_per_s is 0; expected bytes per second in one"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_its_key_and_what_is_expected(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(DeviceError, match=f"cluster.toml:? .*{words}"):
        describe(written(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"none\.toml cannot be read"):
        describe(str(tmp_path / "none.toml"))


def test_kinds_of_the_table_and_of_ones_own_share_a_cluster(tmp_path: Path) -> None:
    text = (
        KIND
        + HOST
        + "count = 2\n[[hosts]]\ndevices = { V100-32GB = 1, L4 = 1 }\n[between]\n"
        + LINK[1:-1].replace(",", "\n")
    )
    cluster = describe(written(tmp_path, text), replicas=[5, 1])
    assert [kind.name for kind in cluster.kinds] == ["small", "V100-32GB", "L4-24GB"]
    assert cluster.link(4, 5) == known_device("L4").inside
    assert cluster.groups == ((0, 1, 2, 3, 4), (5,))
