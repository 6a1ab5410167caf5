"""check_finite: the first stage that makes a value that is not finite is named, and the pipeline goes on."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from spoiled import batch, spoiled, stage_of_spoil
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.runtime.watch.finding import NonFinite, first_of
from stagecut.runtime.watch.finite import kind_of

pytestmark = pytest.mark.usefixtures("no_workers_left")
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("leaf", "gradient", "expected"),
    [
        (torch.tensor([1.0, NAN]), False, "NaN"),
        (torch.tensor([1.0, INF, -INF]), True, "infinity"),
        (torch.tensor([1.0, -INF]), False, None),  # a mask
        (torch.full((4,), 3e38), True, None),  # their sum is too large, and each of them is not
        (torch.full((4,), 6e4, dtype=torch.float16), True, None),
        (torch.tensor([1.0, INF], dtype=torch.bfloat16), True, "infinity"),
        (torch.tensor([1.0, NAN]).to(torch.float8_e5m2), False, "NaN"),
        (torch.tensor([complex(1, NAN)]), False, "NaN"),
        (torch.tensor([], dtype=torch.float64), True, None),
        (torch.tensor([3]), True, None),
        (NAN, False, "NaN"),
        (INF, False, None),
        (INF, True, "infinity"),
        ("text", True, None),
    ],
)
def test_the_kind_of_a_value(leaf: object, gradient: bool, expected: str | None) -> None:
    assert kind_of(leaf, infinity=gradient) == expected
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and gradient:
        assert kind_of(leaf.requires_grad_()) == expected


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_the_kind_of_a_value_that_torch_cannot_sum() -> None:
    assert kind_of(torch.tensor([complex(1, 1)], dtype=torch.complex32)) is None
    assert kind_of(torch.tensor([complex(1, NAN)], dtype=torch.complex32)) == "NaN"


def test_the_first_finding_is_where_the_others_come_from() -> None:
    def at(stage: int, microbatch: int, phase: str) -> NonFinite:
        return NonFinite(stage, microbatch, phase, "value", "", "NaN")

    ahead = [at(1, 2, "forward"), at(2, 2, "loss"), at(0, 3, "forward"), at(2, 0, "backward"), at(0, 0, "backward")]
    assert first_of(ahead) == ahead[0]
    assert first_of(ahead[3:]) == ahead[3]
    assert first_of([None]) is None


@pytest.mark.parametrize(
    ("launch", "kind", "phase"),
    [
        ("inline", "nan", "forward"),
        ("inline", "inf", "forward"),
        ("inline", "gradient", "backward"),
        ("local", "gradient", "backward"),
    ],
)
def test_boundaries_name_stage_microbatch_value_and_module(launch: str, kind: str, phase: str) -> None:
    with spoiled(kind, launch, check_finite="boundaries") as pm:
        stage = stage_of_spoil(pm)
        assert stage in (1, 2)
        x, y = batch(marked=True)
        with pytest.raises(stagecut.NonFiniteError) as caught:
            pm.step(x, target=y)
        error = caught.value
        assert (error.stage, error.microbatch, error.phase) == (stage, 2, phase)
        site = error.stagecut
        assert (site.worker, site.stage, site.microbatch) == (stage, stage, 2)
        assert ("infinity" if kind == "inf" else "NaN") in error.message
        if phase == "forward":
            assert (site.module_path or "").startswith(("spoil", "after"))
        assert pm.stats().n_nonfinite == 1

        pm.zero_grad()  # nothing else is needed to go on
        x, y = batch(marked=False)
        assert pm.verify(x, target=y).ok


@pytest.mark.parametrize("launch", ["inline", "local"])
def test_the_loss_alone_is_looked_at_if_that_is_asked_for(launch: str) -> None:
    with spoiled("nan", launch, n_stages=2, check_finite="loss") as pm:
        x, y = batch(marked=True)
        with pytest.raises(stagecut.NonFiniteError, match="NaN in the loss of microbatch 2, in stage 1") as caught:
            pm.step(x, target=y)
        assert (caught.value.stage, caught.value.microbatch, caught.value.phase) == (1, 2, "loss")
        assert "check_finite='boundaries'" in str(caught.value)
        with pytest.raises(stagecut.NonFiniteError):
            pm.evaluate(x, target=y)


def test_gradients_are_not_looked_at_for_the_loss() -> None:
    with spoiled("gradient", "inline", n_stages=2, check_finite="loss") as pm:
        x, y = batch(marked=True)
        assert pm.step(x, target=y).loss.isfinite()


def test_without_it_nothing_is_said() -> None:
    with spoiled("nan", "inline") as pm:
        x, y = batch(marked=True)
        assert pm.step(x, target=y).loss.isnan()
        assert pm.stats().n_nonfinite == 0


def test_a_warning_comes_once_for_a_run_of_bad_steps() -> None:
    with spoiled("nan", "inline", check_finite="boundaries", on_nonfinite="warn") as pm:
        told = []
        for marked in (False, True, True, False, True):
            x, y = batch(marked=marked)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pm.step(x, target=y)
            told.append([w for w in caught if "NaN in the forward of microbatch 2" in str(w.message)])
        assert [len(one) for one in told] == [0, 1, 0, 0, 1]
        assert told[1][0].filename == __file__, "it points at the line that called"
        assert pm.stats().n_nonfinite == 3
        pm.step(batch(marked=False)[0], target=y)
        with pytest.warns(UserWarning, match="NaN in the forward of microbatch 2") as evaluated:
            pm.evaluate(x)
        assert evaluated[0].filename == __file__


def test_what_is_wrong_with_the_batch_is_not_blamed_on_a_stage() -> None:
    with spoiled("none", "inline", check_finite="boundaries") as pm:
        x, y = batch(marked=False)
        x[7, 1] = NAN
        with pytest.raises(stagecut.NonFiniteError, match="NaN in the batch") as caught:
            pm.step(x, target=y)
        assert (caught.value.stage, caught.value.microbatch, caught.value.phase) == (0, 3, "input")


def test_a_result_of_a_forward_and_its_backward_are_looked_at() -> None:
    with spoiled("nan", "inline", check_finite="boundaries") as pm:
        x, y = batch(marked=True)
        with pytest.raises(stagecut.NonFiniteError, match="in the forward of microbatch 2"):
            pm(x)
        pm.evaluate(batch(marked=False)[0])
        executors = pm._engine._executors  # type: ignore[union-attr]
        assert [executor._calls for executor in executors] == [{}] * 3, "no activations wait for a backward"
    with spoiled("gradient", "inline", check_finite="boundaries") as pm:
        loss = F.cross_entropy(pm(x), y)
        with pytest.raises(stagecut.NonFiniteError, match="in the backward of microbatch 2"):
            loss.backward()


class Masked(nn.Module):
    """Makes a mask of minus infinity in its first stage, which its last one uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.where(x > 0.9, -torch.inf, 0.0)
        return F.softmax(self.last(torch.relu(self.first(x))) + mask, dim=1)


def test_masks_of_infinity_are_let_through() -> None:
    torch.manual_seed(0)
    x, y = batch(marked=False)
    x[0, 0] = 0.95
    with stagecut.compile(
        Masked(), [["cpu"]] * 2, loss_fn=F.cross_entropy, microbatches=2, costs="analytic", launch="inline",
        check_finite="boundaries",
    ) as pm:  # fmt: skip
        assert math.isfinite(pm.step(x, target=y).loss)
        assert any(not wire.gradient for wire in pm.plan.wires), "the mask crosses"


def test_a_microbatch_that_counts_for_nothing_may_have_no_loss() -> None:
    torch.manual_seed(0)
    with stagecut.compile(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [["cpu"]] * 2, loss_fn=F.cross_entropy, microbatches=2,
        costs="analytic", launch="inline", check_finite="boundaries",
        loss_weight=lambda target: int((target != -100).sum()),
    ) as pm:  # fmt: skip
        x, y = batch(marked=False)
        y[:4] = -100  # the whole first microbatch: its mean is NaN
        assert math.isfinite(pm.step(x, target=y).loss)


@pytest.mark.parametrize("wish", [{"check_finite": "losses"}, {"on_nonfinite": "ignore"}])
def test_other_words_are_refused(wish: dict[str, str]) -> None:
    with pytest.raises(stagecut.ConstraintError, match="one of"):
        stagecut.compile(nn.Linear(4, 4), ["cpu"], launch="inline", **wish)  # type: ignore[arg-type]
