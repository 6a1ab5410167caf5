"""This machine's CPU: the quick measurement, and a calibration that is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stagecut.partitioner.calibrate import calibrate
from stagecut.partitioner.cpu import calibration_file, calibration_key, this_cpu
from stagecut.partitioner.describe import describe
from stagecut.tools.calibrate import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("STAGECUT_CACHE", str(tmp_path))
    this_cpu.cache_clear()
    yield tmp_path
    this_cpu.cache_clear()


def test_without_a_calibration_the_cpu_is_measured_quickly_and_nothing_is_kept(folder: Path) -> None:
    torch.set_num_threads(2)
    kind = this_cpu()
    assert torch.get_num_threads() == 2
    assert set(kind.flops_per_s) == {"float32", "float64", "bfloat16"}
    assert kind.rate(torch.float32) > kind.rate(torch.float64)
    assert 1e8 < kind.rate(torch.float32) < 1e13
    assert 1e8 < kind.bytes_per_s < 1e12
    assert 1e-8 < kind.kernel_overhead_s < 1e-3
    assert "tenth of a second" in kind.source
    assert not list(folder.iterdir())


def test_a_calibration_is_kept_and_used(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = calibrate(0.1, lambda what, done, total: seen.append((done, total)))
    assert seen == [(done, 5) for done in range(6)]
    assert this_cpu() == made
    assert made.source == "calibrated on this CPU, one thread, 0.1 s"
    assert describe(["cpu"]).kinds[0].source == made.source
    assert list(json.loads(calibration_file().read_text())) == [calibration_key()]


def test_calibrations_of_other_machines_stay_in_the_file(folder: Path) -> None:
    calibration_file().write_text(json.dumps({"another/2.0": {"kept": True}}))
    assert "calibrated" not in this_cpu().source
    calibrate(0.05)
    assert json.loads(calibration_file().read_text())["another/2.0"] == {"kept": True}
    assert "calibrated" in this_cpu().source


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"KEY": 3}',
        '{"KEY": {"flops_per_s": {"float32": -1}, "bytes_per_s": 1, "kernel_overhead_s": 1, "seconds": 1}}',
        '{"KEY": {"flops_per_s": {}, "bytes_per_s": 1, "kernel_overhead_s": 1, "seconds": 1}}',
        '{"KEY": {"flops_per_s": {"float32": 1}, "bytes_per_s": 1, "kernel_overhead_s": 1, "seconds": "x"}}',
    ],
)
def test_a_file_that_makes_no_sense_is_measured_around(folder: Path, text: str) -> None:
    calibration_file().write_text(text.replace("KEY", calibration_key()))
    assert "tenth of a second" in this_cpu().source


def test_a_calibration_needs_time(folder: Path) -> None:
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        calibrate(0)


def test_the_command_says_what_it_found_and_where_it_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "GFLOP/s" in out
    assert str(calibration_file()) in out
    with pytest.raises(SystemExit):
        main(["--seconds", "0"])


def test_a_result_that_cannot_be_kept_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STAGECUT_CACHE", str(tmp_path / "file"))
    assert main(["--seconds", "0.05"]) == 1
    assert "cannot be kept" in capsys.readouterr().err
