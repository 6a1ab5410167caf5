"""Verification: what counts as a difference."""

from __future__ import annotations

import pytest
import torch

from stagecut.runtime.verify import Gradients, compare

LOSS = torch.tensor(1.0)


def of(dtype: torch.dtype, small: float) -> Gradients:
    """Return the gradients of a large parameter and of one whose gradient cancels out."""
    return Gradients(LOSS, {"large": torch.tensor([3.0], dtype=dtype), "cancelled": torch.tensor([small], dtype=dtype)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_that_cancels_out_may_differ_by_some_units_of_the_last_place_of_the_largest(
    dtype: torch.dtype,
) -> None:
    unit = 3.0 * torch.finfo(dtype).eps
    assert compare(of(dtype, 3 * unit), of(dtype, -2 * unit), {"large", "cancelled"}, None, "model").ok


@pytest.mark.parametrize(("dtype", "wrong"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 0.4)])
def test_a_small_gradient_that_differs_by_more_is_different(dtype: torch.dtype, wrong: float) -> None:
    report = compare(of(dtype, wrong), of(dtype, 0.0), {"large", "cancelled"}, None, "model")
    assert report.first_difference == "cancelled"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [0.0, -0.12])
def test_a_small_gradient_that_is_missing_or_turned_round_is_different(dtype: torch.dtype, wrong: float) -> None:
    report = compare(of(dtype, wrong), of(dtype, 0.12), {"large", "cancelled"}, None, "model")
    assert report.first_difference == "cancelled"


def test_a_small_gradient_is_compared_with_itself() -> None:
    report = compare(of(torch.float32, 0.1), of(torch.float32, 0.1002), {"large", "cancelled"}, None, "model")
    assert report.first_difference == "cancelled"


def test_nothing_may_differ_at_a_tolerance_of_zero() -> None:
    report = compare(of(torch.float32, 1e-9), of(torch.float32, 0.0), {"large", "cancelled"}, 0.0, "model")
    assert report.first_difference == "cancelled"
    assert compare(of(torch.float32, 0.0), of(torch.float32, 0.0), {"large", "cancelled"}, 0.0, "model").ok
