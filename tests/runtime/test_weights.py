"""Models on the meta device get their values from files, or from their own initialisation."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.runtime.weights import Initialised

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
OPTIONS: dict[str, Any] = {"loss_fn": F.mse_loss, "costs": "analytic", "microbatches": 2, "threads_per_worker": 1}


class Tied(nn.Module):
    """A weight with two names, a buffer, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.last = nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.frozen(self.norm(self.first(x)).tanh()))
        return result


def on_meta() -> Tied:
    with torch.device("meta"):
        return Tied()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Tied, Path]:
    """A model, and its weights in two files, the tied one under its second name."""
    torch.manual_seed(0)
    model = Tied()
    model.norm.running_mean.fill_(0.5)  # type: ignore[union-attr]
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "first.weight"}
    half = {name: tensor.clone() for name, tensor in state.items() if name.startswith("norm")}
    save_file(half, tmp_path / "one.safetensors")
    save_file({n: t.clone() for n, t in state.items() if n not in half}, tmp_path / "two.safetensors")
    return model, tmp_path


@pytest.mark.parametrize("launch", ["inline", "local"])
def test_stages_are_filled_from_files_and_parameters_stay_the_same_objects(
    saved: tuple[Tied, Path], launch: str
) -> None:
    plain, folder = saved
    model = on_meta()
    identities = [id(p) for p in model.parameters()]
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    with stagecut.compile(model, [["cpu"], ["cpu"]], weights=folder, launch=launch, **OPTIONS) as pm:
        optimizer = torch.optim.SGD(pm.parameters(), 0.1)  # on the meta device still
        pm.prepare(x)
        assert identities == [id(p) for p in pm.parameters()]
        assert model.last.weight is model.first.weight
        torch.testing.assert_close(pm.state_dict(), plain.state_dict())
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
        assert pm.verify(x, target=y).ok
        before = model.first.weight.detach().clone()
        pm.step(x, target=y)
        optimizer.step()
        assert not torch.equal(model.first.weight, before)


def test_initialisation_does_not_depend_on_the_cut() -> None:
    x = torch.randn(8, 6)
    states = []
    for devices in ([["cpu"]], [["cpu"], ["cpu"]], [["cpu"], ["cpu"], ["cpu"]]):
        torch.manual_seed(5)
        with stagecut.compile(on_meta(), devices, weights="init", launch="inline", **OPTIONS) as pm:
            pm.prepare(x)
            states.append({name: value.clone() for name, value in pm.state_dict().items()})
    torch.testing.assert_close(states[0], states[1])
    torch.testing.assert_close(states[0], states[2])
    assert states[0]["first.weight"].std() > 0
    assert torch.equal(states[0]["norm.running_var"], torch.ones(6))


class Bare(nn.Module):
    """Has a parameter and no way to initialise it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    x = torch.randn(8, 6)

    def compiled(model: nn.Module, **wishes: Any) -> stagecut.Pipeline:
        return stagecut.compile(model, ["cpu"], launch="inline", example_inputs=(x,), **OPTIONS, **wishes)

    with pytest.raises(stagecut.ConstraintError, match=r"first\.weight and 8 more tensors .* on the meta device"):
        compiled(on_meta())
    with pytest.raises(stagecut.ConstraintError, match="this one has values already"):
        compiled(Tied(), weights="init")
    with pytest.raises(stagecut.CheckpointError, match="no safetensors file at"):
        compiled(on_meta(), weights=tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"first.weight": torch.ones(6, 6)}, file)
    with pytest.raises(stagecut.CheckpointError, match=r"first\.bias is in none of the files"):
        compiled(on_meta(), weights=file)
    save_file({"first.weight": torch.ones(6, 5)}, file)
    with pytest.raises(
        stagecut.CheckpointError, match=r"first\.weight has shape \(6, 5\) in .*, and \(6, 6\) in the model"
    ):
        compiled(on_meta(), weights=file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(stagecut.CheckpointError, match="is no whole safetensors file"):
        compiled(on_meta(), weights=file)
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(6, 6), Bare())
    with pytest.raises(stagecut.CheckpointError, match=r"module 1 \(Bare\) has no reset_parameters"):
        compiled(bare, weights="init")


def test_workers_fill_what_is_theirs_and_a_failure_leaves_the_model_without_memory(
    saved: tuple[Tied, Path], tmp_path: Path
) -> None:
    plain, folder = saved
    model = on_meta()
    parameters = list(model.parameters())
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    save_file({"first.weight": torch.ones(6, 6)}, wrong / "model.safetensors")
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    with stagecut.compile(model, [["cpu"], ["cpu"]], weights=wrong, launch="local", **OPTIONS) as pm:
        with pytest.raises(stagecut.CheckpointError, match=r"is in none of the files") as caught:
            pm.step(x, target=y)
        assert any("in _fill" in note for note in caught.value.__notes__), "a worker looked for it"
    assert all(parameter.is_meta for parameter in model.parameters())
    with stagecut.compile(model, [["cpu", "cpu"], ["cpu"]], weights=folder, launch="local", **OPTIONS) as pm:
        pm.prepare(x)
        torch.testing.assert_close(pm.state_dict(), plain.state_dict())
        assert pm.verify(x, target=y).ok
    assert all(a is b for a, b in zip(parameters, model.parameters()))


def test_parts_of_initialisations_are_the_whole_of_it() -> None:
    model = on_meta()
    whole = Initialised(model, 3)
    names = [name for name, _ in model.named_parameters()]
    part = whole.part(names[:2])
    assert not any(module._modules for _, _, module in part._owner.values())
    for name in names[:2]:
        one, other = torch.empty(2, *model.get_parameter(name).shape)
        whole.fill([name], one)
        part.fill([name], other)
        assert torch.equal(one, other)
    with pytest.raises(KeyError):
        part.fill(names[2:3], torch.empty(6))


def held_by(pid: int) -> int:
    """Return how many bytes of a pipeline's shared state a process has touched."""
    maps = psutil.Process(pid).memory_maps(grouped=False)
    return sum(part.rss for part in maps if "stagecut-state" in part.path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what is mapped")
def test_the_parent_holds_nothing_of_what_its_workers_filled() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(32)))
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    x = torch.randn(4, 512)
    with stagecut.compile(model, [["cpu"], ["cpu"]], weights="init", launch="local", **OPTIONS) as pm:
        pm.evaluate(x)
        assert held_by(os.getpid()) < n_bytes / 20
        held = [held_by(worker.pid) for worker in pm.stats().workers]
        assert max(held) < 0.6 * n_bytes
        assert sum(held) >= n_bytes
        assert 0.0 < float(model[0].weight.std()) < 1.0
        assert held_by(os.getpid()) >= model[0].weight.nbytes
