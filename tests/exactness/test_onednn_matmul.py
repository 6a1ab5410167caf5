"""``onednn_matmul``: the unsplit model's gradients but for rounding, by products of oneDNN where they are large."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut import products
from stagecut.errors import ConstraintError
from stagecut.models.transformer import GPT, next_token_loss

pytestmark = pytest.mark.skipif(products.why_no_onednn() is not None, reason=str(products.why_no_onednn()))
WIDTH, ROWS = 160, 96  # large enough for oneDNN in pieces of a third


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH, bias=False), nn.Tanh())


def distance(found: nn.Module, wanted: nn.Module) -> float:
    """Return the largest error of a gradient, as a share of the gradient's norm, in float64."""
    pairs = [(f.grad, w.grad) for f, w in zip(found.parameters(), wanted.parameters())]
    return max(float((f.double() - w.double()).norm() / w.double().norm()) for f, w in pairs if f is not None)


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list to which every product of oneDNN adds what it is and its rows."""
    calls: list[tuple[str, int]] = []
    for name in ("product", "linear", "added_product"):
        real = getattr(products, name)

        def called(*given: torch.Tensor, real: Any = real, name: str = name) -> torch.Tensor:
            result: torch.Tensor = real(*given)
            calls.append((name, result.shape[0]))
            return result

        monkeypatch.setattr(products, name, called)
    return calls


@pytest.mark.parametrize("wishes", [{"schedule": "1f1b"}, {"schedule": "zb-h1"}, {"replicas": 2}], ids=str)
@pytest.mark.parametrize("fuses", [False, True])
def test_gradients_are_those_of_the_unsplit_model_to_rounding(wishes: dict[str, Any], fuses: bool) -> None:
    split, plain, exact = model(), model(), model().double()
    devices = ["cpu"] * 2 if "replicas" in wishes else [["cpu"], ["cpu"]]
    with stagecut.compile(
        split,
        devices,
        loss_fn=F.mse_loss,
        microbatches=3,
        costs="analytic",
        threads_per_worker=1,
        onednn_matmul=True,
        gradient_accumulation_fusion=fuses,
        **wishes,
    ) as pm:
        for step in range(5):  # recorded from the third on
            torch.manual_seed(step)
            x, y = torch.randn(2 * ROWS, WIDTH), torch.randn(2 * ROWS, WIDTH)
            for of in (split, plain, exact):
                of.zero_grad()
            found = pm.step(x, target=y)
            for of in (plain, exact):
                dtype = next(of.parameters()).dtype
                loss = F.mse_loss(of(x.to(dtype)), y.to(dtype))
                loss.backward()
            torch.testing.assert_close(found.loss.double(), loss.detach(), rtol=1e-6, atol=0)
            assert distance(split, exact) < max(4 * distance(plain, exact), 1e-6)


def test_large_products_are_onednns_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = noted(monkeypatch)
    batch = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)

    def step(rows: int, dtype: torch.dtype, onednn: bool) -> list[tuple[str, int]]:
        calls.clear()
        x, y = (value[:rows].to(dtype) for value in batch)
        with stagecut.compile(
            model().to(dtype),
            [["cpu"], ["cpu"]],
            loss_fn=F.mse_loss,
            schedule="zb-h1",  # recorded in the first step
            microbatches=1,
            costs="analytic",
            launch="inline",
            onednn_matmul=onednn,
        ) as pm:
            pm.step(x, target=y)
        return list(calls)

    found = step(ROWS, torch.float32, True)
    # Two layers: forward, and the gradients of both weights and of what is between.
    assert [call for call in found if call == ("linear", ROWS)]
    assert [call for call in found if call == ("product", 4 * WIDTH)]
    assert [call for call in found if call == ("product", ROWS)]
    assert step(ROWS, torch.float32, False) == []
    assert step(ROWS, torch.float64, True) == []
    assert step(8, torch.float32, True) == []  # BLAS is quicker


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "expanded", "every second"])
def test_operands_may_lie_in_memory_as_they_like(layout: str) -> None:
    lay = {
        "plain": lambda m: m,
        "transposed": lambda m: m.t().contiguous().t(),
        "sliced": lambda m: torch.cat([m, m], 1)[:, : m.shape[1]],
        "expanded": lambda m: m[:1].expand_as(m),
        "every second": lambda m: torch.stack([m, m], 2).flatten(1)[:, ::2],
    }[layout]
    torch.manual_seed(0)
    rows, weight, bias = lay(torch.randn(48, 40)), lay(torch.randn(56, 40)), torch.randn(56, 2)[:, 0]
    wanted = rows.double() @ weight.double().t()
    close = {"rtol": 1e-5, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(products.linear(rows, weight), wanted, **close)
    torch.testing.assert_close(products.linear(rows, weight, bias), wanted + bias, **close)
    torch.testing.assert_close(products.product(rows, weight.t()), wanted, **close)
    torch.testing.assert_close(products.added_product(bias, rows, weight.t()), wanted + bias, **close)


class Added(nn.Module):
    """A product that is added to something that is not one number per column."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.other = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.other, x, self.weight).tanh()


@pytest.mark.parametrize("shape", [(), (1,), (WIDTH,), (1, WIDTH), (ROWS, 1), (ROWS, WIDTH)], ids=str)
def test_whatever_is_added_to_a_product(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), Added(*shape), nn.Linear(WIDTH, WIDTH))
    split, x, y = copy.deepcopy(plain), torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    F.mse_loss(plain(x), y).backward()
    with stagecut.compile(
        split,
        [["cpu"], ["cpu"]],
        loss_fn=F.mse_loss,
        schedule="zb-h1",
        microbatches=1,
        costs="analytic",
        launch="inline",
        onednn_matmul=True,
    ) as pm:
        pm.step(x, target=y)
    assert distance(split, plain) < 1e-5


def test_a_transformers_step_is_predicted_from_products_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = noted(monkeypatch)
    torch.manual_seed(0)
    gpt = GPT(256, 128, 2, 4, 32, tied=False)
    x = torch.randint(256, (16, 32))
    for onednn in (False, True):
        calls.clear()
        with stagecut.compile(
            copy.deepcopy(gpt),
            [["cpu"], ["cpu"]],
            loss_fn=next_token_loss,
            microbatches=2,
            launch="inline",
            threads_per_worker=1,
            onednn_matmul=onednn,
            example_inputs=(x,),
            example_target=x,
        ) as pm:
            assert bool(calls) == onednn  # nothing has run but what the planner measured
            assert pm.plan.prediction.step_s > 0


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"compile_stages": True}, "onednn_matmul was given, and compile_stages leaves the backward to torch.compile"),
        ({"recompute": True}, "onednn_matmul was given, and recompute=True leaves the backward to autograd"),
    ],
    ids=["compiled", "recomputed"],
)
def test_what_leaves_nothing_to_record_is_refused(wishes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConstraintError, match=said):
        stagecut.compile(model(), ["cpu"], onednn_matmul=True, **wishes)


def test_a_build_without_onednn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ConstraintError, match="onednn_matmul was given, and this build of torch has no oneDNN"):
        stagecut.compile(model(), ["cpu"], onednn_matmul=True)
