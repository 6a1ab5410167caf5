"""Models that break graph capture: each is refused with a reason, or captured as what it is."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from equality import Call, Eager, compare, different, make_call, own_random_state, seed_everything, usual_calls
from nasty_models import NASTY, Nasty
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from walking import Snapshot, leaves_of, stand_ins_in

import stagecut

ROWS = 4
OTHER_ROWS = (7, 2)

# Entries at whose sizes the model's own Python takes another branch: there the capture may say so.
BRANCHES_ON_ROWS = ("shapes.truth_of_rows",)

# STAGECUT_ALL=1 asks every model; without it every third, for time.
NAMES = list(NASTY) if os.environ.get("STAGECUT_ALL") else sorted({*list(NASTY)[::3], *BRANCHES_ON_ROWS})
everyone = pytest.mark.parametrize("name", NAMES)
# Whether the comparison itself can be believed is asked of every eighth model; it takes as long as the captures.
some = pytest.mark.parametrize("name", list(NASTY)[::8])


@pytest.fixture(autouse=True)
def _apart() -> Iterator[None]:
    """Keep from other tests what a capture that goes wrong leaves behind."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(torch.float32)
    for entry in NASTY.values():
        entry.reset()


def calls_of(entry: Nasty) -> list[Call]:
    other_rows = OTHER_ROWS if entry.other_rows else ()
    return usual_calls(entry.args, entry.kwargs, ROWS, other_rows=other_rows, modes=entry.modes)


def twin_of(entry: Nasty, model: nn.Module) -> nn.Module:
    return copy.deepcopy(model) if entry.copies else entry.model()


def results_vary(model: nn.Module, call: Call) -> bool:
    seen = []
    for _ in range(2):
        seed_everything(call.seed)
        seen.append(model(*copy.deepcopy(call.args), **copy.deepcopy(call.kwargs)))
    return not torch.equal(*seen)


def test_there_are_at_least_a_hundred() -> None:
    assert len(NASTY) >= 100


@some
def test_the_model_and_its_twin_are_the_same(name: str) -> None:
    """The comparison can be believed: eager training passes it, and equal seeds give equal models."""
    entry = NASTY[name]
    model = entry.model()
    twin = twin_of(entry, model)
    assert compare(model, Eager(twin), calls_of(entry), values=entry.deterministic, reset=entry.reset) == []
    assert entry.deterministic or results_vary(model, calls_of(entry)[0])


@some
def test_the_comparison_sees_other_weights(name: str) -> None:
    entry = NASTY[name]
    if not entry.deterministic:
        pytest.skip("only the form of its results is compared")
    model = entry.model()
    twin = twin_of(entry, model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.05)
    assert compare(model, Eager(twin), calls_of(entry)[:1], reset=entry.reset) != []


def test_what_a_capture_leaves_behind_is_seen() -> None:
    model = NASTY["state.cached_functions"].model()
    before = Snapshot(model)
    assert before.changes() == []
    model.lin.register_forward_hook(lambda module, args, output: None)
    model.left = 1
    torch.rand(1)
    with torch.no_grad():
        model.out.bias.add_(1)
    changes = "; ".join(before.changes())
    for what in ("_forward_hooks", "'left'] is new", "state out.bias has other", "torch's random state has other"):
        assert what in changes
    assert stand_ins_in(model) == []
    model.lin.register_forward_hook(functools.partial(print, FakeTensorMode().from_tensor(torch.ones(1))))
    assert stand_ins_in(model) == ["torch._subclasses.fake_tensor.FakeTensor"]


@everyone
def test_a_capture_is_refused_or_does_what_the_model_does(name: str) -> None:
    entry = NASTY[name]
    model = entry.model()
    captured_model = twin_of(entry, model)
    example = make_call("example", entry.args, entry.kwargs, ROWS, 0)
    entry.reset()
    seed_everything(3)
    before = Snapshot(captured_model)
    capture, refusal = None, ""
    try:
        capture = stagecut.capture(captured_model, example.args, example.kwargs)
    except stagecut.CaptureError as error:
        refusal = error.message
    assert before.changes() == []
    assert stand_ins_in(captured_model) == []
    again = make_call("example", entry.args, entry.kwargs, ROWS, 0)
    assert different(dict(leaves_of(again)), dict(leaves_of(example)), 0.0) == []
    if capture is None:
        assert refusal
        assert "fails on the example inputs" not in refusal  # no model here does that by itself
        return
    found = compare(model, capture, calls_of(entry), values=entry.deterministic, reset=entry.reset)
    if name in BRANCHES_ON_ROWS:
        assert len(found) == 1
        assert "ShapeError: the model branches on sizes" in found[0]
        return
    assert found == []
    with own_random_state():
        assert entry.deterministic or results_vary(capture.module, calls_of(entry)[0])
