"""Batches cut into microbatches and put together again."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.errors import ShapeError
from stagecut.runtime.batch import (
    cloned,
    match_inputs,
    merge_outputs,
    piece_sizes,
    shares,
    signature_of,
    split_gradients,
    split_inputs,
    split_target,
)
from stagecut.runtime.program import InputLeaf, InputSpec
from stagecut.structure import call_leaves

property_test = settings(max_examples=150, deadline=None, derandomize=True)


def forward(x: Any, mask: Any = None, scale: float = 1.0, table: Any = None) -> None:
    """The signature of the captured model."""


def captured(*args: Any, **kwargs: Any) -> InputSpec:
    """What capture would say of a call with 4 rows."""
    leaves, structure = call_leaves(forward, args, kwargs)
    names = ["x", "mask", "scale", "table"]
    known = [
        InputLeaf(name, name, None, leaf.dim() > 0 and leaf.shape[0] == 4)
        if isinstance(leaf, torch.Tensor)
        else InputLeaf(name, None, leaf)
        for name, leaf in zip(names, leaves)
    ]
    return InputSpec(structure, tuple(known))


SPEC = captured(torch.zeros(4, 3), torch.zeros(4), 2.0, torch.zeros(7))


@property_test
@given(st.integers(1, 200), st.integers(1, 40))
def test_pieces_are_even_nonempty_and_add_up(rows: int, n_pieces: int) -> None:
    sizes = piece_sizes(rows, n_pieces)
    assert sum(sizes) == rows
    assert len(sizes) == min(rows, n_pieces)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_arguments_become_graph_inputs_by_name() -> None:
    x, mask, table = torch.ones(9, 3), torch.ones(9), torch.ones(7)
    inputs, rows = match_inputs(SPEC, forward, (x,), {"table": table, "scale": 2.0, "mask": mask})
    assert rows == 9
    assert inputs["x"] is x
    assert inputs["mask"] is mask
    assert inputs["table"] is table
    assert set(inputs) == {"x", "mask", "table"}


def test_a_call_without_batched_tensors_has_one_row() -> None:
    spec = InputSpec(call_leaves(forward, (torch.zeros(()),), {})[1], (InputLeaf("x", "x"),))
    assert match_inputs(spec, forward, (torch.zeros(()),), {})[1] == 1


X, MASK, TABLE = torch.zeros(5, 3), torch.zeros(5), torch.zeros(7)
WRONG_CALLS: dict[str, tuple[tuple[Any, ...], str]] = {
    "a constant changed": ((X, MASK, 3.0, TABLE), "argument 'scale' was 2.0 when the model was captured and is 3.0"),
    "a constant of another type": ((X, MASK, 2, TABLE), "argument 'scale' was 2.0"),
    "a tensor for a constant": ((X, MASK, torch.tensor(2.0), TABLE), "argument 'scale' was 2.0"),
    "a constant for a tensor": ((X, None, 2.0, TABLE), "argument 'mask' must be a tensor, got NoneType"),
    "other rows": ((X, torch.zeros(6), 2.0, TABLE), "argument 'mask' has 6 rows where the first argument has 5"),
    "no batch dimension": ((X, torch.zeros(()), 2.0, TABLE), "argument 'mask' has no batch dimension"),
    "no rows": ((torch.zeros(0, 3), torch.zeros(0), 2.0, TABLE), "the batch has no rows"),
    "a gradient wanted": ((X, MASK.clone().requires_grad_(), 2.0, TABLE), "argument 'mask' requires a gradient"),
    "fewer arguments": ((X, MASK, 2.0), r"captured with arguments \(x, mask, scale, table\)"),
    "another nesting": ((X, (MASK,), 2.0, TABLE), "another structure"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_call_of_another_form_is_refused_with_the_argument(case: str) -> None:
    args, words = WRONG_CALLS[case]
    with pytest.raises(ShapeError, match=words):
        match_inputs(SPEC, forward, args, {})


def test_a_constant_that_is_not_a_number_equals_itself() -> None:
    spec = captured(torch.zeros(4, 3), torch.zeros(4), float("nan"))
    match_inputs(spec, forward, (X, MASK, float("nan")), {})
    with pytest.raises(ShapeError, match="argument 'scale'"):
        match_inputs(spec, forward, (X, MASK, 1.0), {})


@property_test
@given(st.integers(1, 30), st.integers(1, 8))
def test_microbatches_put_together_are_the_batch(rows: int, n_pieces: int) -> None:
    sizes = piece_sizes(rows, n_pieces)
    inputs = {"x": torch.randn(rows, 3), "mask": torch.arange(rows), "table": torch.randn(7)}
    pieces = split_inputs(SPEC, inputs, sizes)
    assert [piece["x"].shape[0] for piece in pieces] == sizes
    assert all(piece["table"] is inputs["table"] for piece in pieces)
    merged, how = merge_outputs([(piece["x"], {"m": piece["mask"]}) for piece in pieces], sizes)
    assert how == ["cat", "cat"]
    assert torch.equal(merged[0], inputs["x"])
    assert torch.equal(merged[1]["m"], inputs["mask"])


def test_targets_are_cut_where_they_have_rows() -> None:
    target = {"labels": torch.arange(5), "weights": torch.ones(3), "name": "t", "nested": (torch.zeros(5, 2), 0.5)}
    first, second = split_target(target, 5, [3, 2])
    assert first["labels"].tolist() == [0, 1, 2]
    assert second["labels"].tolist() == [3, 4]
    assert second["weights"] is target["weights"]
    assert (first["name"], first["nested"][1]) == ("t", 0.5)
    assert second["nested"][0].shape == (2, 2)
    assert split_target(None, 5, [3, 2]) == (None, None)


class Result(NamedTuple):
    logits: Any
    loss: Any
    table: Any
    note: Any


def test_each_leaf_of_a_result_is_merged_by_its_kind() -> None:
    sizes = [3, 2]
    parts = [
        Result(torch.full((3, 2), 1.0), torch.tensor(1.0), torch.ones(7), "n"),
        Result(torch.full((2, 2), 2.0), torch.tensor(6.0), torch.ones(7), "n"),
    ]
    merged, how = merge_outputs(parts, sizes)
    assert how == ["cat", "mean", "same", "same"]
    assert type(merged) is Result
    assert merged.logits[:, 0].tolist() == [1, 1, 1, 2, 2]
    assert merged.loss.item() == pytest.approx((3 * 1.0 + 2 * 6.0) / 5)
    assert merged.table is parts[0].table
    assert merged.note == "n"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2) + 1, r"leaf 0 .*neither one row per sample"),
        (torch.tensor(1), torch.tensor(2), "leaf 0"),
        ("a", "b", r"leaf 0 .*\(str\)"),
        (torch.zeros(()), 0.0, "leaf 0"),
        ((torch.zeros(3), 1), (torch.zeros(2), 2), "leaf 1"),
        ([1], (1,), "another structure in different microbatches"),
    ],
)
def test_results_that_cannot_be_put_together_are_refused(first: Any, second: Any, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        merge_outputs([first, second], [3, 2])


@property_test
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_gradients_of_a_merged_result_are_what_autograd_gives_the_parts(sizes: list[int]) -> None:
    shared = torch.randn(9)
    parts = [[torch.randn(size, 2, requires_grad=True), torch.randn((), requires_grad=True)] for size in sizes]
    merged, how = merge_outputs([[*part, shared] for part in parts], sizes)
    upstream = [torch.randn_like(leaf) for leaf in merged]
    expected = torch.autograd.grad(merged[:2], [leaf for part in parts for leaf in part], upstream[:2])
    given_back = split_gradients(upstream, how, sizes)
    assert len(given_back) == len(sizes)
    for m in range(len(sizes)):
        assert torch.equal(given_back[m][0], expected[2 * m])
        assert torch.allclose(given_back[m][1], expected[2 * m + 1])
    if "same" in how:
        assert torch.allclose(sum(part[2] for part in given_back), upstream[2])


def test_a_leaf_without_gradient_gives_none_to_every_microbatch() -> None:
    assert split_gradients([None, torch.ones(3)], ["cat", "cat"], [2, 1])[1][0] is None


@property_test
@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=6))
def test_shares_add_up_to_one_or_are_refused(weights: list[float]) -> None:
    if sum(weights) <= 1e-300:
        return
    assert sum(shares(weights)) == pytest.approx(1.0)
    assert all(share >= 0 for share in shares(weights))


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 0.5], [float("nan"), 1.0], []])
def test_shares_of_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ShapeError, match="must add up to a positive number"):
        shares(weights)


def test_equal_signatures_mean_equal_shapes_dtypes_and_mode() -> None:
    pieces = tuple({"x": torch.zeros(rows, 2, dtype=dtype)} for rows, dtype in [
        (3, torch.float32), (3, torch.float32), (2, torch.float32), (3, torch.float64)])  # fmt: skip
    a, b, shorter, wider = signature_of(pieces, 0)
    assert a == b
    assert len({a, shorter, wider}) == 3
    assert signature_of(pieces, 1)[0] != a
    assert signature_of(({"x": torch.ones(3, 2)},), 0)[0] == a


def test_cloned_copies_tensors_and_keeps_the_rest() -> None:
    x, other = torch.zeros(2), object()
    copy = cloned({"x": x, "o": (other, 1)})
    copy["x"].fill_(1)
    assert x.tolist() == [0, 0]
    assert copy["o"] == (other, 1)
