"""STAGECUT_TRACE: what is known of a step that failed goes into one file, and the error says where it is."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from spoiled import MARK, N_MICROBATCHES, batch, spoiled, stage_of_spoil
from torch.nn import functional as F

import stagecut
from stagecut.partitioner.plan import parse
from stagecut.records import from_json

pytestmark = pytest.mark.usefixtures("no_workers_left")


def only_bundle(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    assert path.name.startswith("stagecut-crash-")
    assert path.suffix == ".json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("launch", ["inline", "local"])
def test_a_step_that_fails_leaves_a_bundle(launch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not there yet"
    monkeypatch.setenv("STAGECUT_TRACE", str(folder))
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("MY_TORCH_PASSWORD", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with spoiled("raise", launch) as pm:
        x, y = batch(marked=False)
        pm.step(x, target=y)
        assert not folder.exists(), "a step that does not fail leaves none"
        x, y = batch(marked=True)
        with pytest.raises(ZeroDivisionError) as caught:
            pm.step(x, target=y)
        stage, plan = stage_of_spoil(pm), pm.plan
    found = only_bundle(folder)
    assert any(str(folder) in note for note in caught.value.__notes__)
    assert found["format"] == 1
    error = found["error"]
    assert (error["type"], error["message"]) == ("builtins.ZeroDivisionError", "a marked row")
    assert error["site"] == str(caught.value.stagecut)  # type: ignore[attr-defined]
    assert "raise ZeroDivisionError" in error["traceback"]
    worker = found["workers"][stage]
    assert worker["at"] == f"F(stage {stage}, microbatch 2)" == worker["instructions"][worker["position"]]
    assert worker["before"] == worker["instructions"][max(0, worker["position"] - 8) : worker["position"]]
    assert len(found["workers"]) == 3
    assert found["request"]["kind"] == "train"
    assert found["request"]["n_microbatches"] == N_MICROBATCHES
    assert parse(found["plan"]) == plan
    assert from_json(stagecut.Stats, found["stats"]).n_steps == 1
    assert found["versions"]["torch"] == str(torch.__version__)
    assert found["versions"]["stagecut"] == stagecut.__version__
    assert (found["launch"], found["devices"]) == (launch, ["cpu"] * 3)
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    allowed = ("STAGECUT_", "TORCH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    assert all(key.startswith(allowed) for key in found["environment"])
    text = json.dumps(found)
    assert "hunter2" not in text
    assert str(MARK) not in text.replace("MARK", ""), "no tensor's values"


def test_what_is_not_finite_leaves_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGECUT_TRACE", str(tmp_path))
    with spoiled("nan", "inline", check_finite="boundaries") as pm:
        x, y = batch(marked=True)
        with pytest.raises(stagecut.NonFiniteError):
            pm.step(x, target=y)
    assert only_bundle(tmp_path)["error"]["type"] == "stagecut.errors.NonFiniteError"


def test_a_bundle_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("STAGECUT_TRACE", str(tmp_path / "file" / "folder"))
    with spoiled("raise", "inline") as pm:
        x, y = batch(marked=True)
        with pytest.raises(ZeroDivisionError, match="a marked row") as caught:
            pm.step(x, target=y)
    (note,) = [note for note in caught.value.__notes__ if "STAGECUT_TRACE" in note]
    assert "no crash bundle: NotADirectoryError" in note


class Speechless(Exception):
    """An exception whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def speechless_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    raise Speechless


def test_an_error_without_a_text_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGECUT_TRACE", str(tmp_path))
    x, y = batch(marked=False)
    with (
        stagecut.compile(
            torch.nn.Linear(4, 4), ["cpu"], loss_fn=speechless_loss, launch="inline", example_inputs=(x,)
        ) as pm,
        pytest.raises(Speechless),
    ):
        pm.step(x, target=y)
    assert only_bundle(tmp_path)["error"]["message"] == "(no text: RuntimeError in its __str__)"


class Unsendable(torch.nn.Linear):
    """A layer that cannot be sent to a worker."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.guard = threading.Lock()


def test_workers_that_cannot_be_set_up_leave_one_without_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGECUT_TRACE", str(tmp_path))
    with pytest.raises(stagecut.StageError, match="cannot be sent to a worker"):
        stagecut.compile(
            torch.nn.Sequential(Unsendable()), ["cpu"], loss_fn=F.cross_entropy, costs="analytic", opaque=("0",),
            example_inputs=(torch.zeros(8, 4),),
        )  # fmt: skip
    found = only_bundle(tmp_path)
    assert (found["request"], found["workers"], found["plan"]["model"]) == (None, [], "Sequential")


def test_without_the_variable_nothing_is_written_or_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGECUT_TRACE", raising=False)
    with spoiled("raise", "inline") as pm, pytest.raises(ZeroDivisionError) as caught:
        pm.step(batch(marked=True)[0], target=batch(marked=True)[1])
    assert not any("STAGECUT_TRACE" in note or "crash" in note for note in caught.value.__notes__)
