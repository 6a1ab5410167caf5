"""Any model, cut, schedule, microbatches, replicas and batch size: loss and gradients are the unsplit model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch
from dag_models import Case, draw_case, make_batch, worst_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stagecut

T = TypeVar("T")
TOLERANCE = 1e-10


class Drawn:
    """Choices made by hypothesis, so that a failing model shrinks."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def choose(self, options: Sequence[T]) -> T:
        return self._data.draw(st.sampled_from(options))


def compiled(case: Case, launch: str) -> stagecut.Pipeline:
    return stagecut.compile(case.model, list(case.plan.devices), loss_fn=case.loss, plan=case.plan, launch=launch)


exactness = settings(
    max_examples=24, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.fixture(autouse=True)
def _quiet(recwarn: Any) -> None:
    torch.set_num_threads(1)


@exactness
@given(st.data())
def test_step_gives_the_unsplit_models_loss_and_gradients(data: st.DataObject) -> None:
    case = draw_case(Drawn(data))
    with compiled(case, "inline") as pm:
        loss = pm.step(*case.args, target=case.target, **case.kwargs).loss
        assert worst_error(case, loss) <= TOLERANCE


@exactness
@given(st.data())
def test_replicas_of_any_count_per_stage_change_nothing(data: st.DataObject) -> None:
    case = draw_case(Drawn(data), max_ops=6, max_stages=3, replicas=(1, 2, 3))
    with compiled(case, "inline") as pm:
        loss = pm.step(*case.args, target=case.target, **case.kwargs).loss
        assert worst_error(case, loss) <= TOLERANCE


@exactness
@given(st.data())
def test_forward_then_backward_of_the_callers_loss_gives_the_same(data: st.DataObject) -> None:
    case = draw_case(Drawn(data), max_ops=6)
    with compiled(case, "inline") as pm:
        loss = case.loss(pm(*case.args, **case.kwargs), case.target)
        loss.backward()
        assert worst_error(case, loss.detach()) <= TOLERANCE


@settings(exactness, max_examples=15)
@given(st.data())
def test_recorded_stages_give_the_same_whatever_the_schedule(data: st.DataObject) -> None:
    case = draw_case(Drawn(data), max_ops=6)
    with pytest.MonkeyPatch.context() as patch, compiled(case, "inline") as pm:
        patch.setattr("stagecut.runtime.explicit.STEPS_BEFORE", 0)  # at once
        pm.prepare(*case.args, **case.kwargs)
        for executor in pm._engine._executors:
            for stage in executor.stages.values():
                stage.steady = True
        loss = pm.step(*case.args, target=case.target, **case.kwargs).loss
        assert worst_error(case, loss) <= TOLERANCE


@settings(exactness, max_examples=15)
@given(st.data(), st.integers(1, 12))
def test_a_batch_of_another_size_needs_no_new_plan(data: st.DataObject, rows: int) -> None:
    case = draw_case(Drawn(data), max_ops=5)
    with compiled(case, "inline") as pm:
        pm.prepare(*case.args, **case.kwargs)
        args, kwargs, target = make_batch(case.model.spec, rows)
        other = Case(case.model, args, kwargs, target, case.loss, case.plan)
        loss = pm.step(*args, target=target, **kwargs).loss
        assert worst_error(other, loss) <= TOLERANCE
