"""Checkpoints whose sums fit and whose contents do not: each is refused, and nothing has changed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stagecut
from stagecut.errors import CheckpointError
from stagecut.runtime.checkpoint import folder, read_state
from stagecut.runtime.checkpoint.folder import MANIFEST
from stagecut.runtime.checkpoint.values import decoded

PROCESS = "process-0000.json"
Forge = Callable[[Any], Any]


def compiled() -> Any:
    x = torch.randn(4, 3)
    return stagecut.compile(
        nn.Linear(3, 3), ["cpu"], loss_fn=nn.functional.mse_loss, example_inputs=(x,), launch="inline", costs="analytic"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with compiled() as pm:
        optimizer = torch.optim.Adam(pm.parameters())
        pm.step(torch.randn(4, 3), target=torch.randn(4, 3))
        optimizer.step()
        return pm.save(tmp_path_factory.mktemp("saved"), 1, optimizer=optimizer, data=[1]).wait()  # type: ignore[no-any-return]


def sealed(path: Path, manifest: dict[str, Any]) -> None:
    for record in manifest["files"]:
        file = path / record["name"]
        if len(record["name"]) < 200 and file.is_file():
            record |= {"n_bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (path / MANIFEST).write_text(json.dumps({"manifest": manifest, "sha256": folder._sum_of(manifest)}))


def forged(saved: Path, target: Path, *, process: Forge | None = None, values: Forge | None = None) -> Path:
    """Copy the checkpoint, change what a process wrote or the manifest's values, and make the sums fit."""
    path = Path(shutil.copytree(saved, target / saved.name))
    manifest = json.loads((path / MANIFEST).read_text())["manifest"]
    if process is not None:
        (path / PROCESS).write_text(json.dumps(process(json.loads((path / PROCESS).read_text()))))
    if values is not None:
        manifest["values"] = json.dumps(values(json.loads(manifest["values"])))
    sealed(path, manifest)
    return path


def refused(path: Path, words: str) -> None:
    """Load it, and look that generators are as they were."""
    with compiled() as pm:
        optimizer = torch.optim.Adam(pm.parameters())
        states = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        with pytest.raises(CheckpointError, match=words):
            pm.load(path, optimizer=optimizer)
        assert (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()) == states


PROCESSES: dict[str, tuple[Forge, str]] = {
    "states that are a number": (lambda p: p | {"states": 3}, "values that are none of a checkpoint"),
    "a state that is text": (lambda p: p | {"states": {"weight": "x"}}, "values that are none of a checkpoint"),
    "an entry without its list": (lambda p: p | {"states": {"weight": {"step": 3}}}, "none of a checkpoint"),
    "an entry of nothing": (lambda p: p | {"states": {"weight": {"step": []}}}, "none of a checkpoint"),
    "no generator": (lambda p: p | {"random": {}}, "state of random generators is none: KeyError"),
    "a generator of another version": (
        lambda p: p | {"random": p["random"] | {"python": {"kind": "tuple", "items": [1, 2, 3]}}},
        "state of random generators is none: ValueError",
    ),
    "a generator that is a number": (
        lambda p: p | {"random": p["random"] | {"numpy": 5}},
        "state of random generators is none: TypeError",
    ),
}
VALUES: dict[str, tuple[Forge, str]] = {
    "aliases to numbers": (lambda v: v | {"aliases": {"weight": 3}}, "none of a checkpoint"),
    "names of None": (lambda v: v | {"groups": [v["groups"][0] | {"names": [None]}]}, "none of a checkpoint"),
    "settings that are a number": (lambda v: v | {"groups": [v["groups"][0] | {"settings": 1.5}]}, "none of a"),
    "data of two": (lambda v: v | {"data": [1, 2]}, "none of a checkpoint"),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_what_a_process_never_writes_is_refused(case: str, saved: Path, tmp_path: Path) -> None:
    change, words = PROCESSES[case]
    refused(forged(saved, tmp_path, process=change), words)


@pytest.mark.parametrize("case", VALUES)
def test_values_that_are_never_written_are_refused(case: str, saved: Path, tmp_path: Path) -> None:
    change, words = VALUES[case]
    refused(forged(saved, tmp_path, values=change), words)


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "\ud800", ""])
def test_a_name_that_no_file_has_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path / saved.name))
    manifest = json.loads((path / MANIFEST).read_text())["manifest"]
    manifest["files"][0]["name"] = name
    sealed(path, manifest)
    with pytest.raises(CheckpointError, match=r"is missing|File name too long"):
        read_state(path)


def test_a_process_record_that_is_no_text_is_refused(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path / saved.name))
    (path / PROCESS).write_bytes(b"\xff{}")
    sealed(path, json.loads((path / MANIFEST).read_text())["manifest"])
    with pytest.raises(CheckpointError, match=rf"{PROCESS}: 'utf-8' codec can't decode"):
        read_state(path)


@pytest.mark.parametrize(
    "value",
    [
        {"kind": [1], "items": []},
        {"kind": "tensor", "dtype": {}, "items": []},
        {"kind": "tensor", "dtype": "torch.int32", "shape": [1], "items": [10**30]},
        {"kind": "float", "text": []},
    ],
)
def test_a_value_of_no_kind_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="a checkpoint's values hold"):
        decoded(value)


def test_a_value_nested_more_deeply_than_python_calls_is_refused() -> None:
    value: Any = 0
    for _ in range(5_000):
        value = [value]
    with pytest.raises(CheckpointError, match="nested too deeply"):
        decoded(value)
