"""Saving and loading: resumed training is the undisturbed one, whatever ran it; what is not whole is not loaded."""

from __future__ import annotations

import json
import random
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stagecut
from stagecut.errors import CheckpointError
from stagecut.runtime.checkpoint import Saving, folder, read_state
from stagecut.runtime.checkpoint.folder import MANIFEST, checkpoints, newest

INLINE: dict[str, Any] = {"launch": "inline", "costs": "analytic", "microbatches": 2}


class Net(nn.Module):
    """Dropout, BatchNorm, a frozen layer, an unused one, and a weight that the first and the last stage share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.frozen(self.drop(self.norm(self.first(x))))))


def compiled(devices: Any = (["cpu"], ["cpu"]), **wishes: Any) -> Any:
    torch.manual_seed(1)
    return stagecut.compile(
        Net().double(), list(devices), loss_fn=F.mse_loss, example_inputs=(batch(0)[0],), **{**INLINE, **wishes}
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=made, dtype=torch.float64), torch.randn(
        8, 6, generator=made, dtype=torch.float64
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9, nesterov=True),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, 1e-2),
    "tensor lr": lambda parameters: torch.optim.Adam(parameters, torch.tensor(1e-2), amsgrad=True),
}


def train(pm: Any, optimizer: Any, scheduler: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        losses.append(float(pm.step(x + 0.01 * torch.randn(8, 6, dtype=torch.float64), target=y).loss))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def equipped(pm: Any, kind: str) -> tuple[Any, Any]:
    optimizer = OPTIMIZERS[kind]([p for p in pm.parameters() if p.requires_grad])
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6], 0.5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("wait", [True, False])
def test_five_steps_and_five_after_a_load_are_ten_steps_to_the_bit(kind: str, wait: bool, tmp_path: Path) -> None:
    with compiled() as pm:
        optimizer, scheduler = equipped(pm, kind)
        torch.manual_seed(7)
        undisturbed = train(pm, optimizer, scheduler, range(10))
        wanted = {name: value.clone() for name, value in pm.state_dict().items()}
    with compiled() as pm:
        optimizer, scheduler = equipped(pm, kind)
        torch.manual_seed(7)
        first = train(pm, optimizer, scheduler, range(5))
        saving = pm.save(tmp_path, 5, optimizer=optimizer, scheduler=scheduler, data={"batch": 5}, wait=wait)
        train(pm, optimizer, scheduler, range(5, 7))  # what goes on beside changes nothing of what is written
        assert saving.wait() == tmp_path / "step-00000005"
    with compiled() as pm:
        optimizer, scheduler = equipped(pm, kind)
        torch.manual_seed(99)
        loaded = pm.load(tmp_path, optimizer=optimizer, scheduler=scheduler)
        assert (loaded.step, loaded.data, loaded.passed_over) == (5, {"batch": 5}, ())
        second = train(pm, optimizer, scheduler, range(loaded.data["batch"], 10))
        assert first + second == undisturbed
        for name, value in pm.state_dict().items():
            assert torch.equal(value, wanted[name]), name


def test_another_plan_and_other_workers_go_on_alike(tmp_path: Path) -> None:
    with compiled() as pm:
        optimizer, scheduler = equipped(pm, "adamw")
        torch.manual_seed(7)
        train(pm, optimizer, scheduler, range(3))
        pm.save(tmp_path, 3, optimizer=optimizer, scheduler=scheduler)
        wanted = train(pm, optimizer, scheduler, range(3, 6))
    others: list[tuple[Any, dict[str, Any]]] = [
        (["cpu"], {"stages": 1}),
        ([["cpu"], ["cpu"], ["cpu"]], {}),
        ([["cpu"], ["cpu"]], {"launch": "local", "threads_per_worker": 1}),
    ]
    for devices, wishes in others:
        with compiled(devices, **wishes) as pm:
            optimizer, scheduler = equipped(pm, "adamw")
            pm.load(tmp_path, optimizer=optimizer, scheduler=scheduler)
            losses = train(pm, optimizer, scheduler, range(3, 6))
        assert losses == pytest.approx(wanted, rel=1e-12)


def test_the_state_loads_into_the_plain_model(tmp_path: Path) -> None:
    with compiled() as pm:
        pm.save(tmp_path, 0)
        expected = {name: value.clone() for name, value in pm.state_dict().items()}
    plain = Net().double()
    plain.load_state_dict(read_state(tmp_path))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert plain.last.weight is plain.first.weight


def test_names_may_hold_what_separates_other_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model.add_module("a/b optimizer/c", nn.Linear(6, 6).double())
    with stagecut.compile(model, ["cpu"], loss_fn=F.mse_loss, example_inputs=(batch(0)[0],), **INLINE) as pm:
        optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
        x, y = batch(0)
        pm.step(x, target=y)
        optimizer.step()
        pm.save(tmp_path, 1, optimizer=optimizer)
        wanted = [value["exp_avg"].clone() for value in optimizer.state.values()]
        again = torch.optim.AdamW(pm.parameters(), 1.0)
        pm.load(tmp_path, optimizer=again)
        assert again.param_groups[0]["lr"] == 1e-2
        assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(wanted, again.state.values(), strict=True))


def test_every_stage_has_a_file_and_a_shared_weight_is_written_once(tmp_path: Path) -> None:
    with compiled() as pm:
        path = pm.save(tmp_path, 1).wait()
    names = sorted(each.name for each in path.iterdir())
    assert names == [
        MANIFEST, "process-0000.json", "process-0000.safetensors", "stage-0000.safetensors", "stage-0001.safetensors"
    ]  # fmt: skip
    from safetensors import safe_open

    keys: list[str] = []
    for name in names[3:]:
        with safe_open(path / name, framework="pt") as file:
            keys += file.keys()
    assert len(keys) == len(set(keys)) == len(list(Net().named_parameters())) + 3  # and a BatchNorm's three buffers


def test_the_generators_of_python_and_numpy_go_on_too(tmp_path: Path) -> None:
    with compiled() as pm:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        pm.save(tmp_path, 1)
        wanted = (random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item())
        random.seed(4)
        pm.load(tmp_path)
        assert (random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()) == wanted


def test_the_newest_are_kept(tmp_path: Path) -> None:
    with compiled() as pm:
        for step in (1, 5, 12, 30):
            pm.save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000030", "step-00000012"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000012", "step-00000030"]


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    with compiled() as pm:
        pm.save(tmp_path, 4)
        with pytest.raises(CheckpointError, match="step-00000004 exists, and no checkpoint is overwritten"):
            pm.save(tmp_path, 4)


def damage_of(kind: str, path: Path) -> None:
    file = path / "stage-0001.safetensors"
    if kind == "a flipped bit":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif kind == "cut short":
        file.write_bytes(file.read_bytes()[:-5])
    elif kind == "missing":
        file.unlink()
    elif kind == "swapped":
        other = path / "stage-0000.safetensors"
        content = other.read_bytes()
        shutil.copy(file, other)
        file.write_bytes(content)
    elif kind == "a link":
        file.rename(path.parent / "elsewhere")
        file.symlink_to(path.parent / "elsewhere")
    elif kind == "a stranger":
        (path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    elif kind == "no JSON":
        (path / MANIFEST).write_text("{")
    else:
        whole = json.loads((path / MANIFEST).read_text())
        if kind == "another step":
            whole["manifest"]["step"] = 1
        elif kind == "a way out":  # by somebody who can make sums
            record = whole["manifest"]["files"][0]
            shutil.copy(path / record["name"], path.parent / record["name"])
            record["name"] = f"../{record['name']}"
            whole["sha256"] = folder._sum_of(whole["manifest"])
        (path / MANIFEST).write_text(json.dumps(whole))


DAMAGE = [
    "a flipped bit",
    "cut short",
    "missing",
    "swapped",
    "a link",
    "a stranger",
    "no JSON",
    "another step",
    "a way out",
]


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_whole_is_passed_over_for_the_one_before(kind: str, tmp_path: Path) -> None:
    with compiled() as pm:
        good = pm.save(tmp_path, 1).wait()
        wanted = {name: value.clone() for name, value in pm.state_dict().items()}
        with torch.no_grad():
            pm.model.first.bias.add_(1.0)
        damage_of(kind, pm.save(tmp_path, 2).wait())
        with pytest.warns(UserWarning, match="a checkpoint was passed over: .*step-00000002"):
            loaded = pm.load(tmp_path)
        assert loaded.path == good
        assert len(loaded.passed_over) == 1
        assert all(torch.equal(value, wanted[name]) for name, value in pm.state_dict().items())
        with pytest.raises(CheckpointError, match="step-00000002"):
            pm.load(tmp_path / "step-00000002")


def test_there_is_nothing_to_load(tmp_path: Path) -> None:
    with compiled() as pm, pytest.raises(CheckpointError, match="there is no checkpoint in"):
        pm.load(tmp_path)


def test_a_disk_that_is_full_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with compiled() as pm:
        pm.save(tmp_path, 1)

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(CheckpointError, match="No space left on device") as raised:
            pm.save(tmp_path, 2)
        assert "bytes are left there" in str(raised.value.hint)
        with pytest.raises(CheckpointError, match="No space left"):
            pm.save(tmp_path, 3, wait=False).wait()
        monkeypatch.undo()
        assert pm.load(tmp_path).step == 1
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert pm.save(tmp_path, 4).wait() == newest(tmp_path)[0]


def test_what_a_background_save_failed_at_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pm = compiled()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    pm.save(tmp_path, 1, wait=False)
    with pytest.raises(CheckpointError, match="full"):
        pm.close()


@pytest.mark.parametrize("in_background", [True, False])
def test_a_checkpoint_that_is_written_holds_nothing_of_what_was_saved(in_background: bool) -> None:
    copy_of_weights = nn.Linear(2, 2)
    alive = weakref.ref(copy_of_weights)
    saving = Saving(lambda it=copy_of_weights: Path(f"step-{it.in_features}"), in_background)  # type: ignore[misc]
    del copy_of_weights
    assert saving.wait() == Path("step-2")
    assert alive() is None


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    with compiled() as pm:
        pm.save(tmp_path / "bare", 1)
        pm.save(tmp_path / "whole", 1, optimizer=torch.optim.SGD(pm.parameters(), 0.1))
        with pytest.raises(CheckpointError, match="was saved without an optimizer"):
            pm.load(tmp_path / "bare", optimizer=torch.optim.SGD(pm.parameters(), 0.1))
        with pytest.raises(CheckpointError, match=r"group 0 of the optimizer has other parameters .*: first\.weight"):
            pm.load(tmp_path / "whole", optimizer=torch.optim.SGD([pm.model.first.bias], 0.1))
        with pytest.raises(CheckpointError, match="not the pipeline's"):
            pm.save(tmp_path, 2, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1))
        with pytest.raises(CheckpointError, match=r"scheduler\.f is a builtin_function_or_method"):
            pm.save(tmp_path, 2, scheduler={"f": print})
    wide = Net().double()
    wide.frozen = nn.Linear(6, 6, bias=True, dtype=torch.float64)
    wide.unused = nn.Linear(3, 2, dtype=torch.float64)
    pm = stagecut.compile(wide, ["cpu"], loss_fn=F.mse_loss, example_inputs=(batch(0)[0],), **INLINE)
    before = wide.first.weight.detach().clone()
    with pm, pytest.raises(CheckpointError, match=r"unused.weight: expected shape \(2, 3\), got \(2, 2\)"):
        pm.load(tmp_path / "bare")
    assert torch.equal(wide.first.weight, before)
    other = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    pm = stagecut.compile(other, ["cpu"], loss_fn=F.mse_loss, example_inputs=(batch(0)[0],), **INLINE)
    with pm, pytest.raises(CheckpointError, match=r"is of another model \(Net\): missing \['0.bias'"):
        pm.load(tmp_path / "bare")


def test_nothing_is_said_where_nothing_was_passed_over(tmp_path: Path) -> None:
    with compiled() as pm:
        pm.save(tmp_path, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pm.load(tmp_path)


def test_what_was_shared_loads_where_it_is_not(tmp_path: Path) -> None:
    with compiled() as pm:
        pm.save(tmp_path, 1)
        wanted = pm.model.first.weight.detach().clone()
    apart = Net().double()
    apart.last.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    pm = stagecut.compile(apart, ["cpu"], loss_fn=F.mse_loss, example_inputs=(batch(0)[0],), **INLINE)
    with pm:
        pm.load(tmp_path)
    assert torch.equal(apart.last.weight, wanted)
    assert torch.equal(apart.first.weight, wanted)


def test_nothing_is_changed_where_something_does_not_fit(tmp_path: Path) -> None:
    with compiled() as pm:
        pm.save(tmp_path, 1, optimizer=torch.optim.SGD(pm.parameters(), 0.1))
        with torch.no_grad():
            pm.model.first.bias.fill_(3.0)
        optimizer = torch.optim.SGD([{"params": list(pm.parameters()), "lr": 7.0}])
        with pytest.raises(CheckpointError, match="was saved without a scheduler"):
            pm.load(tmp_path, optimizer=optimizer, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1))
        with pytest.raises(CheckpointError, match="group 0 of the optimizer has other parameters"):
            pm.load(tmp_path, optimizer=torch.optim.SGD([pm.model.first.bias], 0.1))
        assert bool((pm.model.first.bias == 3.0).all())
        assert optimizer.param_groups[0]["lr"] == 7.0


def test_a_run_that_goes_on_from_before_a_broken_one_saves_that_step_again(tmp_path: Path) -> None:
    with compiled() as pm:
        for step in (1, 2, 3):
            pm.save(tmp_path, step)
        for step in (2, 3):
            damage_of("cut short", tmp_path / f"step-{step:08d}")
        with pytest.warns(UserWarning, match="passed over"):
            assert pm.load(tmp_path).step == 1
        with pytest.warns(UserWarning, match="stage-0001.safetensors .* it is broken-step-00000002-"):
            pm.save(tmp_path, 2, keep=1)  # what comes later is not whole, and must not push this one out
        with pytest.warns(UserWarning, match="passed over: .*step-00000003"):
            assert pm.load(tmp_path).step == 2
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]


def test_a_folder_without_a_manifest_is_passed_over_and_named(tmp_path: Path) -> None:
    with compiled() as pm:
        pm.save(tmp_path, 1)
        pm.save(tmp_path, 2)
        (tmp_path / "step-00000002" / MANIFEST).unlink()
        with pytest.warns(UserWarning, match="step-00000002"):
            assert pm.load(tmp_path).step == 1
