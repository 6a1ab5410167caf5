"""Stages through torch.compile."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
X, Y = torch.randn(8, 6), torch.randn(8, 6)


def compiled(backend: bool | str, **wishes: Any) -> stagecut.Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    options = {"microbatches": 2, "schedule": "1f1b", "costs": "analytic", "threads_per_worker": 1, **wishes}
    return stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=F.mse_loss, compile_stages=backend, **options)


@pytest.mark.parametrize("wishes", [{}, {"recompute": True}, {"launch": "inline"}], ids=str)
def test_compiled_stages_train_in_all_modes(wishes: dict[str, Any]) -> None:
    with compiled("aot_eager", **wishes) as pm:
        for _ in range(3):
            assert pm.verify(X, target=Y).ok
        pm.step(X[:4], target=Y[:4])
        pm.eval()
        expected = pm.model(X).detach()
        torch.testing.assert_close(pm.evaluate(X).output, expected)


def test_batchnorms_of_compiled_stages_keep_their_mode() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.Tanh(), nn.Linear(6, 6))
    options: dict[str, Any] = {"microbatches": 2, "costs": "analytic", "compile_stages": "aot_eager"}
    with stagecut.compile(model, ["cpu"], loss_fn=F.mse_loss, batchnorm="deferred", launch="inline", **options) as pm:
        for _ in range(3):
            wanted = nn.BatchNorm1d(6)
            wanted.load_state_dict(norm.state_dict())
            wanted(model[0](X))
            pm.step(X, target=Y)
            torch.testing.assert_close(norm.running_var, wanted.running_var)
    with stagecut.compile(model, [["cpu", "cpu"]], loss_fn=F.mse_loss, batchnorm="sync", **options) as pm:
        for _ in range(3):
            pm.step(X, target=Y)
            assert pm.verify(X, target=Y).ok


def test_inductor_compiles_stages() -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor wants a C++ compiler")
    with compiled(True) as pm:
        assert pm.verify(X, target=Y).ok


def test_a_schedule_with_split_backwards_runs_them_whole_and_says_so() -> None:
    with compiled("aot_eager", schedule="zb-h1", launch="inline") as pm:
        with pytest.warns(UserWarning, match=r"runs its backward whole: torch.compile makes one backward of it"):
            pm.step(X, target=Y)
        assert pm.verify(X, target=Y).ok


def test_a_backend_that_is_not_there_is_refused() -> None:
    with pytest.raises(stagecut.ConstraintError, match=r"compile_stages='fastest' is no backend of torch\.compile: "):
        compiled("fastest")
