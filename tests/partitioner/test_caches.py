"""Files of measured costs and calibrations that are damaged: they are measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagecut.partitioner.costs.cache import Cache
from stagecut.partitioner.cpu import calibration_file, calibration_key, kept_calibration

KIND = {"flops_per_s": {"float32": 1e10}, "bytes_per_s": 1e9, "kernel_overhead_s": 1e-6, "seconds": 1.0}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGECUT_CACHE", str(tmp_path))


def test_costs_are_known_again() -> None:
    cache = Cache()
    cache.known["relu"] = (1e-3, 2e-3, 0.0)
    cache.save()
    assert Cache().known == {"relu": (1e-3, 2e-3, 0.0)}


@pytest.mark.parametrize(
    "text",
    ["", "[]", '"costs"', "null", DEEP, *(json.dumps({"relu": entry}) for entry in (3, [1.0], [10**400, 1, 1, 1, 1]))],
)
def test_costs_that_cannot_be_read_are_measured_again(text: str) -> None:
    Cache().path.write_text(text)
    cache = Cache()
    assert cache.known == {}
    cache.known["relu"] = (1e-3, 2e-3, 0.0)
    cache.save()
    assert Cache().known == {"relu": (1e-3, 2e-3, 0.0)}


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_costs_that_nothing_can_cost_are_measured_again(seconds: float) -> None:
    Cache().path.write_text(json.dumps({"relu": [1e-3, seconds, 0.0, 1.0, 1.0]}))
    assert Cache().known == {}


@pytest.mark.parametrize("value", [DEEP, {"bytes_per_s": 10**400}, {"flops_per_s": None}, {"seconds": "x"}])
def test_a_calibration_that_cannot_be_read_is_none(value: Any) -> None:
    file = calibration_file()
    file.write_text(json.dumps({calibration_key(): KIND}))
    assert kept_calibration() is not None
    file.write_text(value if isinstance(value, str) else json.dumps({calibration_key(): KIND | value}))
    assert kept_calibration() is None
