"""stagecut.load: a plan from its file, a pipeline from a folder of checkpoints, and clear words for the rest."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.errors import CheckpointError, ConstraintError, PlanError, StagecutError
from stagecut.runtime.checkpoint import read_state
from stagecut.runtime.checkpoint.weights import CheckpointWeights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
INLINE: dict[str, Any] = {"loss_fn": F.mse_loss, "launch": "inline", "costs": "analytic", "microbatches": 2}
X, Y = torch.ones(4, 3), torch.zeros(4, 2)


def model(seed: int, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 2)]
    return nn.Sequential(*layers)


def trained(folder: Path) -> stagecut.Pipeline:
    """Save steps 1 and 2 of a pipeline of two stages, and return it."""
    pm = stagecut.compile(model(0), [["cpu"], ["cpu"]], **INLINE)
    optimizer = torch.optim.AdamW(pm.parameters(), 1e-1)
    for step in (1, 2):
        pm.step(X, target=Y)
        optimizer.step()
        pm.save(folder, step, optimizer=optimizer)
    return pm


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("devices", [["cpu"], [["cpu"], ["cpu"], ["cpu"]]])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_of_checkpoints_is_a_pipeline_on_the_devices_given(
    tmp_path: Path, devices: Any, at_once: bool
) -> None:
    pm = trained(tmp_path)
    again = model(9)
    generator = torch.get_rng_state()
    inputs = {"example_inputs": (X,)} if at_once else {}
    loaded = stagecut.load(tmp_path, again, devices=devices, **inputs, **INLINE)
    assert torch.equal(torch.get_rng_state(), generator)
    assert loaded.model is again
    assert same(loaded.state_dict(), pm.state_dict())
    assert loaded.evaluate(X, target=Y).loss == pm.evaluate(X, target=Y).loss
    assert len(loaded.plan.stages) == len(devices)


def test_one_checkpoint_may_be_named(tmp_path: Path) -> None:
    trained(tmp_path)
    first = stagecut.load(tmp_path / "step-00000001", model(9), ["cpu"], **INLINE)
    newest = stagecut.load(tmp_path, model(9), ["cpu"], **INLINE)
    assert not same(first.state_dict(), newest.state_dict())


def test_training_goes_on_with_an_optimizer_that_was_made_of_it(tmp_path: Path) -> None:
    pm = trained(tmp_path)
    loaded = stagecut.load(tmp_path, model(9), ["cpu"], **INLINE)
    optimizer = torch.optim.AdamW(loaded.parameters(), 1e-1)
    assert loaded.resume(tmp_path, optimizer=optimizer).step == 2
    assert loaded.step(X, target=Y).loss == pm.step(X, target=Y).loss


@pytest.mark.parametrize("launch", ["inline", "local"])
def test_a_model_without_memory_is_filled_where_it_runs(tmp_path: Path, launch: str) -> None:
    pm = trained(tmp_path)
    with torch.device("meta"):
        empty = model(9)
    with stagecut.load(tmp_path, empty, [["cpu"], ["cpu"]], **{**INLINE, "launch": launch}) as loaded:
        expected = pm.evaluate(X, target=Y).loss
        assert loaded.evaluate(X, target=Y).loss == expected
        assert same(loaded.state_dict(), pm.state_dict())
    stagecut.end_workers()


def test_ranks_read_the_checkpoint_that_rank_0_found(tmp_path: Path) -> None:
    trained(tmp_path)
    weights = CheckpointWeights(tmp_path, model(9))
    weights.agree(lambda own: 1)  # rank 0 looked before step 2 was whole
    own = model(9)
    weights.fill_all(own)
    assert same(dict(own.state_dict()), read_state(tmp_path / "step-00000001"))
    assert not same(dict(own.state_dict()), read_state(tmp_path))


def test_a_newest_one_that_is_not_whole_is_passed_over_aloud(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "step-00000002" / "stage-0000.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"):
        loaded = stagecut.load(tmp_path, model(9), ["cpu"], **INLINE)
    assert same(
        loaded.state_dict(), stagecut.load(tmp_path / "step-00000001", model(9), ["cpu"], **INLINE).state_dict()
    )


def test_what_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    trained(tmp_path / "checkpoints")
    plan = stagecut.plan(model(0), ["cpu"], example_inputs=(X,), costs="analytic")
    plan.save(tmp_path / "plan.json")
    (tmp_path / "empty").mkdir()
    with torch.device("meta"):
        other_on_meta = model(9, width=6)
    own = model(9)
    wrong: list[tuple[Any, nn.Module, dict[str, Any], type[Exception], str]] = [
        ("empty", own, {}, CheckpointError, "there is no checkpoint in"),
        ("nowhere", own, {}, CheckpointError, "there is no checkpoint in"),
        ("plan.json", own, {}, CheckpointError, r"is a file, and checkpoints are in folders\n.*plan="),
        ("checkpoints", model(9, width=6), {}, CheckpointError, r"0\.weight: expected shape \(6, 3\), got \(5, 3\)"),
        ("checkpoints", other_on_meta, {}, CheckpointError, r"0\.weight: expected shape \(6, 3\), got \(5, 3\)"),
        ("empty", other_on_meta, {}, CheckpointError, "there is no checkpoint in"),
        ("checkpoints", nn.Linear(3, 2), {}, CheckpointError, "is of another model"),
        ("checkpoints", own, {"loss_reduction": "max"}, ConstraintError, "loss_reduction must be"),
        ("checkpoints", own, {"devices": ["nonsense"]}, StagecutError, "is no device"),
        ("checkpoints", own, {"devices": None}, ConstraintError, "no devices to compile it for"),
    ]
    for name, given, options, error, words in wrong:
        before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
        with pytest.raises(error, match=words):
            stagecut.load(tmp_path / name, given, **{"devices": ["cpu"], **INLINE, **options})
        assert all(tensor.is_meta for tensor in before.values()) or same(before, dict(given.state_dict()))


def test_a_plan_is_a_file_and_takes_no_options(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(PlanError, match=r"is a folder, and a plan is a file\n.*model, devices"):
        stagecut.load(tmp_path)
    load: Any = stagecut.load
    with pytest.raises(ConstraintError, match="was given devices, loss_fn, and no model"):
        load(tmp_path, devices=["cpu"], loss_fn=F.mse_loss)


def test_its_options_are_those_of_compile() -> None:
    compile_ = dict(inspect.signature(stagecut.compile).parameters)
    load = dict(inspect.signature(stagecut.load).parameters)
    assert list(load)[:3] == ["path", "model", "devices"]
    del compile_["weights"]  # which the checkpoint has
    assert list(load)[3:] == list(compile_)[2:]
    for name in list(load)[3:]:
        assert (load[name].default, load[name].annotation) == (compile_[name].default, compile_[name].annotation)


def test_reading_a_plan_takes_no_torch(tmp_path: Path) -> None:
    stagecut.plan(model(0), ["cpu"], example_inputs=(X,), costs="analytic").save(tmp_path / "plan.json")
    code = f"import sys, stagecut; stagecut.load({str(tmp_path / 'plan.json')!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
