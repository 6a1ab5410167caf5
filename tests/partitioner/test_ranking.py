"""Bounds that leave configurations out: no step is below its bound, and the best plan is that of trying all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from dag_models import random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import stagecut
from stagecut.partitioner import ranking
from stagecut.partitioner.capture import capture
from stagecut.partitioner.describe import describe
from stagecut.partitioner.explain import reasons
from stagecut.partitioner.pricing import Pricer
from stagecut.partitioner.step_bound import least_step_s
from stagecut.structure import call_leaves

property_test = settings(max_examples=4, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@property_test
@given(
    seed=st.integers(0, 10**6),
    replicas=st.sampled_from([[1, 1], [2, 2], [2, 1], [1, 1, 1]]),
    n_microbatches=st.sampled_from([1, 2, 8]),
    schedule=st.sampled_from(["1f1b", "fill-drain"]),
)
def test_no_step_is_shorter_than_its_bound(seed: int, replicas: list[int], n_microbatches: int, schedule: str) -> None:
    model, args, kwargs = random_problem(seed)
    spec = f"sim:{sum(replicas)}xA100-80GB"
    try:
        made = stagecut.plan(
            model, spec, example_inputs=args, example_kwargs=kwargs,
            replicas=replicas, microbatches=n_microbatches, schedule=schedule,
        )  # fmt: skip
    except stagecut.errors.InfeasibleError:
        return  # fewer ops than stages
    leaves, _ = call_leaves(model.forward, args, kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    n_pieces = min(made.batch_rows, n_microbatches * max(replicas))
    pricer = Pricer(capture(model, args, kwargs), tensors, describe(spec), "analytic")
    priced = pricer.at(-(-made.batch_rows // n_pieces))
    bound_s = least_step_s(priced, replicas, n_pieces)
    assert 0 < bound_s <= made.prediction.step_s


@settings(property_test, max_examples=2)
@given(seed=st.integers(0, 10**6))
def test_the_best_plan_is_found_without_drafting_all(seed: int) -> None:
    model, args, kwargs = random_problem(seed, max_ops=12)

    def planned(worth: float) -> tuple[stagecut.Plan, int]:
        drafted = []

        def drafts_of(*given):  # type: ignore[no-untyped-def]
            drafted.append(given)
            return original(*given)

        original = ranking.drafts_of
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranking, "_WORTH_DRAFTING", worth)
            patch.setattr(ranking, "drafts_of", drafts_of)
            made = stagecut.plan(model, "sim:2x6xA100-80GB", example_inputs=args, example_kwargs=kwargs)
        return made, len(drafted)

    (pruned, n_pruned), (full, n_full) = planned(1.0), planned(float("inf"))
    assert pruned.stages == full.stages
    assert pruned.prediction == full.prediction
    assert n_pruned <= n_full


def took(plan: stagecut.Plan, step_s: float) -> stagecut.Plan:
    return replace(plan, prediction=replace(plan.prediction, step_s=step_s))


@pytest.fixture(scope="module")
def two_plans() -> tuple[stagecut.Plan, stagecut.Plan]:
    """One device, and data parallelism, on CPUs."""
    model, x = torch.nn.Linear(4, 4), torch.randn(8, 4)
    options: Any = {"example_inputs": (x,), "costs": "analytic"}
    return stagecut.plan(model, ["cpu"], **options), stagecut.plan(model, ["cpu", "cpu"], replicas=2, **options)


@pytest.mark.parametrize(("gain", "n_workers"), [(0.2, 2), (0.04, 2), (0.02, 1), (0.0, 1)])
def test_more_cpu_workers_have_to_be_faster_by_more_than_predictions_are_off(
    two_plans: tuple[stagecut.Plan, stagecut.Plan], gain: float, n_workers: int
) -> None:
    one, two = took(two_plans[0], 1.0 + gain), took(two_plans[1], 1.0)
    ranked = sorted([one, two], key=ranking.rank)
    assert len(ranking.simplest_of_close(ranked).devices) == n_workers


@pytest.mark.parametrize(("gain", "n_microbatches"), [(0.04, 4), (0.02, 1)])
def test_whole_batches_come_first_where_microbatches_are_faster_by_less_than_predictions_are_off(
    two_plans: tuple[stagecut.Plan, stagecut.Plan], gain: float, n_microbatches: int
) -> None:
    whole, pieces = took(two_plans[1], 1.0 + gain), took(replace(two_plans[1], n_microbatches=4), 1.0)
    chosen = ranking.simplest_of_close([pieces, whole])
    assert chosen.n_microbatches == n_microbatches
    if chosen is whole:
        assert reasons(whole, [pieces], [], [])[0].endswith("shorter as predicted, in more microbatches")


def test_devices_that_share_no_cores_are_all_used_if_that_is_faster(
    two_plans: tuple[stagecut.Plan, stagecut.Plan],
) -> None:
    one, two = took(two_plans[0], 1.01), took(two_plans[1], 1.0)
    apart = [replace(plan, timing=replace(plan.timing, n_cores=None)) for plan in (two, one)]
    assert ranking.simplest_of_close(apart) is apart[0]


def test_a_choice_that_is_not_the_fastest_says_why(two_plans: tuple[stagecut.Plan, stagecut.Plan]) -> None:
    one, two = took(two_plans[0], 1.0), took(two_plans[1], 0.97)
    assert reasons(one, [two], [], [])[0] == (
        f"too close to tell: data parallel on 2 devices, {two.schedule}, 1 microbatch, 3.0% shorter as predicted, "
        "with more workers"
    )
