"""Functions that are kept whole, tensors that only sizes decide, and state that a first call sets up."""

from __future__ import annotations

import contextvars
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from few_rows import rows
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.errors import ShapeError
from stagecut.partitioner.capture import Capture, capture
from stagecut.partitioner.recording.calls import Call
from stagecut.partitioner.recording.numbers import Ref
from stagecut.partitioner.recording.settled import settled_value
from stagecut.runtime.program.calls import KeptFunction, KeptMethod, OutOfReach, form_of

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


class Base(nn.Module):
    """Two layers around what a test adds; it has a parameter of its own for methods to use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.last = nn.Linear(3, 3)
        self.filler = nn.Parameter(torch.ones(3))
        self.share = 0.5

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.between(self.first(x)))

    def between(self, h: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def caught(model: nn.Module, x: torch.Tensor | None = None) -> Capture:
    x = rows() if x is None else x
    found = capture(model, (x,))
    check = found.verify((x,), rows=None if found.inputs.rows else 7)
    assert check.ok, str(check)
    return found


def names(found: Capture) -> list[str]:
    return [call.name for call in found.opaque]


# --- what is kept ------------------------------------------------------------------------------------------------


def mask_of(shape: tuple[int, ...], share: float) -> np.ndarray:
    return np.random.rand(*shape) < share


class Masked(Base):
    """As wav2vec 2.0 masks spans: numpy decides, the module's own parameter is filled in, in training only."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.masked(h)

    def masked(self, h: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return h
        h[torch.from_numpy(mask_of((h.shape[0],), self.share))] = self.filler
        return h


def biggest(h: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return h * (scale * float(h.abs().max().item()))


class CallsAFunction(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return biggest(h, scale=0.5) + h


class CallsAStaticMethod(Base):
    @staticmethod
    def scaled(h: torch.Tensor) -> torch.Tensor:
        return h * max(1.0, h.sum().item())

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.scaled(h)


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return 2 * function(*args)

    return wrapper


class CallsADecoratedMethod(Base):
    @doubled
    @torch.no_grad()
    def weight(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tensor(np.tanh(h.detach().numpy()).mean(axis=1, keepdims=True)) * self.share

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h * self.weight(h)


def closing_over(level: float) -> Callable[..., Any]:
    def above(h: torch.Tensor) -> torch.Tensor:
        return h if h.sum().item() > level else -h

    return above


ABOVE = closing_over(0.5)


class CallsAClosure(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return ABOVE(h)


KEPT = {
    Masked: "masked()",
    CallsAFunction: "biggest()",
    CallsAStaticMethod: "scaled()",
    CallsADecoratedMethod: "weight()",
    CallsAClosure: "above()",
}


@pytest.mark.parametrize("kind", KEPT)
def test_the_function_that_cannot_be_followed_is_kept_and_nothing_else(kind: type[Base]) -> None:
    found = caught(kind())
    assert names(found) == [KEPT[kind]]
    layers = [node.target for node in found.graph.nodes if node.op == "call_module" and "mode" not in str(node.target)]
    assert layers == ["first", "last"]


@pytest.mark.parametrize("kind", KEPT)
def test_functions_have_their_own_code_after_a_capture(kind: type[Base]) -> None:
    functions = [mask_of, biggest, closing_over, ABOVE, Masked.masked, CallsAStaticMethod.scaled]
    functions += [CallsADecoratedMethod.weight, CallsADecoratedMethod.weight.__wrapped__.__wrapped__]  # type: ignore[attr-defined]
    before = [function.__code__ for function in functions]
    capture(kind(), (rows(),))
    assert [function.__code__ for function in functions] == before


def test_a_failing_capture_gives_functions_their_code_back() -> None:
    class Fails(CallsAFunction):
        def between(self, h: torch.Tensor) -> torch.Tensor:
            return super().between(h) @ torch.ones(5, 5)

    before = biggest.__code__
    with pytest.raises(Exception, match="fails on the example"):
        capture(Fails(), (rows(),))
    assert biggest.__code__ is before


def test_the_report_names_the_function_its_line_and_what_it_hides() -> None:
    lines = caught(CallsAFunction()).report().splitlines()
    assert lines[0].endswith("not captured whole, with 1 opaque function that cannot be cut inside")
    assert lines[1] == "  opaque biggest() (function): it reads a number out of a tensor (item)"
    assert "test_kept_functions.py:" in lines[2]
    assert lines[3] == "    hides from the cut: 0% of the parameters and 0% of the forward FLOPs"


def multiplied(h: torch.Tensor) -> torch.Tensor:
    return h @ h.T @ h * h.max().item()


def test_the_flops_of_a_kept_function_are_known() -> None:
    class Multiplies(Base):
        def between(self, h: torch.Tensor) -> torch.Tensor:
            return multiplied(h)

    (hidden,) = caught(Multiplies()).hidden()
    assert hidden.n_modules == 0
    assert hidden.parameter_share == 0
    # Two rows: 2 * (2 * 3 * 2 + 2 * 2 * 3) in the function, 2 * (2 * 2 * 3 * 3) in the layers.
    assert hidden.flop_share == pytest.approx(48 / (48 + 72))


def test_a_graph_with_a_kept_method_can_be_pickled() -> None:
    model = Masked()
    graph = pickle.loads(pickle.dumps(caught(model).graph_module))
    calls = [node.target for node in graph.graph.nodes if isinstance(node.target, KeptMethod)]
    assert len(calls) == 1
    assert calls[0].function is Masked.masked
    assert list(calls[0].attributes) == ["share"]


@pytest.mark.parametrize("launch", ["inline", "auto"])
@pytest.mark.usefixtures("no_workers_left")
def test_a_pipeline_runs_kept_functions(launch: str) -> None:
    model, x = CallsADecoratedMethod().double(), rows(8).double()
    wanted = F.mse_loss(model(x), x)
    wanted.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    warnings.simplefilter("ignore")  # of the costs, and that the shapes behind the function need a run of the model
    with stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=F.mse_loss, example_inputs=(x,), launch=launch) as pm:
        torch.testing.assert_close(pm.step(x, target=x).loss, wanted.detach(), rtol=1e-10, atol=0)
        for name, parameter in pm.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-14)


# --- what is not -------------------------------------------------------------------------------------------------


class SetsAnAttribute(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.remembered(h)

    def remembered(self, h: torch.Tensor) -> torch.Tensor:
        self.seen = h.sum().item()
        return h * self.seen


class UsesALayer(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.twice(h)

    def twice(self, h: torch.Tensor) -> torch.Tensor:
        return self.last(h) * h.sum().item()


class AsksForALayer(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.asking(h)

    def asking(self, h: torch.Tensor) -> torch.Tensor:
        return h * h.sum().item() if hasattr(self, "last") else h


class ListsParameters(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.counted(h)

    def counted(self, h: torch.Tensor) -> torch.Tensor:
        return h * (h.sum().item() + len(list(self.parameters())))


class Appends(Base):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.noted(h)

    def noted(self, h: torch.Tensor) -> torch.Tensor:
        self.history.append(h.sum().item())
        return h * len(self.history)


class MayReturnNothing(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        mask = self.mask_or_none(h > 100)
        return h if mask is None else h.masked_fill(mask, 0.0)

    def mask_or_none(self, mask: torch.Tensor) -> torch.Tensor | None:
        return mask if mask.any().item() else None


class ClosesOverALayer(Base):
    def __init__(self) -> None:
        super().__init__()

        def scaled(h: torch.Tensor) -> torch.Tensor:
            return self.last(h) * h.sum().item()

        self.scaled = scaled

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.last(self.scaled(h))


class ClosesOverAParameter(Base):
    def __init__(self) -> None:
        super().__init__()
        filler = self.filler

        def filled(h: torch.Tensor) -> torch.Tensor:
            return filler * h.sum().item()

        def scaled(h: torch.Tensor) -> torch.Tensor:
            return h + filled(h)

        self.scaled = scaled

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.last(self.scaled(h))


class Holder:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def scaled(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h) * h.sum().item()


class HoldsALayerElsewhere(Base):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["holder"] = Holder(self.last)

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.last(self.holder.scaled(h))


@pytest.mark.parametrize("kind", [ClosesOverALayer, ClosesOverAParameter, HoldsALayerElsewhere])
def test_a_function_that_comes_by_parameters_unseen_is_no_call_of_its_own(kind: type[Base]) -> None:
    found = capture(nn.Sequential(nn.Linear(3, 3), kind()), (rows(),))
    assert names(found) == ["1"]


@pytest.mark.parametrize("kind", [SetsAnAttribute, UsesALayer, AsksForALayer, ListsParameters, Appends])
def test_a_function_that_does_more_is_no_call_of_its_own(kind: type[Base]) -> None:
    found = caught(nn.Sequential(nn.Linear(3, 3), kind()))
    assert names(found) == ["1"]
    assert not any(isinstance(node.target, KeptFunction) for node in found.graph.nodes)


def test_the_next_function_outwards_is_kept_where_the_innermost_cannot_be() -> None:
    assert names(caught(Masked())) == ["masked()"]  # mask_of returns an array
    assert names(caught(MayReturnNothing())) == ["between()"]  # mask_or_none returns a tensor for some data


def test_a_result_of_another_form_is_refused() -> None:
    kept = KeptFunction(lambda flag: torch.ones(1) if flag else None)
    kept.form = form_of(torch.ones(1))
    assert torch.equal(kept(True), torch.ones(1))
    with pytest.raises(ShapeError, match=r"(?s)returned NoneType where it returned Tensor.*opaque="):
        kept(False)


class MaskOrNone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(100.0))

    def forward(self, h: torch.Tensor) -> torch.Tensor | None:
        mask = h > self.level
        return mask if mask.any() else None


class UsesTheMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask = MaskOrNone()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.mask(x)
        return self.lin(x) if mask is None else self.lin(x).masked_fill(mask, 0.0) * 2


def test_an_opaque_module_that_returns_something_else_for_other_data_is_noticed() -> None:
    found = capture(UsesTheMask(), (rows(),))
    assert torch.equal(found.module(rows()), found.model(rows()))
    with pytest.raises(ShapeError, match="'mask' returned Tensor where it returned NoneType"):
        found.module(rows() + 1000)


def test_a_method_that_reads_more_than_when_captured_is_refused() -> None:
    kept = KeptMethod(AsksForALayer.asking, AsksForALayer, {}, frozenset({"last"}))
    with pytest.raises(OutOfReach, match="'last'"):
        kept((), rows())


# --- what only sizes decide --------------------------------------------------------------------------------------


class OwnMask(Base):
    """The default of many libraries: a mask of ones that the model makes itself, and then looks at."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(h.shape[0], 5)
        if (mask == 0).any():
            return h * 3
        return h * torch.arange(4).max().item() + mask.sum(1).max().item()


def test_tensors_that_only_sizes_decide_can_be_read() -> None:
    assert names(caught(OwnMask())) == []


class ReadsTheBatch(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h * (2 if torch.ones(h.shape[0]).sum().item() > 8 else 1)


def test_what_the_batch_size_decides_is_not_taken_from_the_example() -> None:
    found = caught(nn.Sequential(nn.Linear(3, 3), ReadsTheBatch()))
    assert names(found) == ["1"]
    big = rows(9)
    torch.testing.assert_close(found.module(big), found.model(big), rtol=0, atol=0)


def test_another_size_that_decides_otherwise_is_refused() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 3)
            self.head = nn.Linear(3, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.embed(ids)
            if torch.ones(ids.shape[1]).sum() > 8:
                h = h * 2
            return self.head(h)

    found = capture(Text(), (torch.zeros(4, 6, dtype=torch.long),))
    assert names(found) == []
    for length in (4, 6, 9):
        ids = torch.zeros(4, length, dtype=torch.long)
        if length == 9:
            with pytest.raises(ShapeError, match=r"a tensor that sizes decide \(.*test_kept_functions.py:\d+\): True"):
                found.module(ids)
        else:
            assert torch.equal(found.module(ids), found.model(ids))


@pytest.mark.parametrize(
    "made",
    [
        lambda self, h: torch.rand(3),
        lambda self, h: self.filler * 2,
        lambda self, h: torch.zeros(3).add_(h.detach()[0]),
        lambda self, h: torch.dropout(torch.ones(3), 0.5, True),
    ],
)
def test_random_numbers_parameters_and_data_are_not_settled_by_sizes(made: Callable[..., torch.Tensor]) -> None:
    class Reads(Base):
        def between(self, h: torch.Tensor) -> torch.Tensor:
            number = made(self, h).sum().item()
            return h * number

    assert names(capture(nn.Sequential(nn.Linear(3, 3), Reads()), (rows(),))) == ["1.between()"]


def spans(n: int) -> torch.Tensor:
    return torch.from_numpy(np.random.rand(n) < 0.5)


def evens(n: int) -> torch.Tensor:
    return torch.arange(0, n, 2)


@pytest.mark.parametrize(
    ("target", "settled"), [(evens, True), (KeptFunction(evens), False), (KeptFunction(spans), False)]
)
def test_what_a_kept_function_gives_for_a_size_is_not_settled_by_it(target: Any, settled: bool) -> None:
    """It may draw numbers that torch does not see, as ``spans`` does."""
    calls = [Call("call_function", target, (6,)), Call("call_method", "sum", (Ref(0),))]
    value = settled_value(calls, Ref(1))
    assert (value is not None) == settled
    assert not settled or value == 6


# --- checks ------------------------------------------------------------------------------------------------------


class Demands(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        assert h.abs().max().item() < 1000, f"too large: {h.max()}"
        bad = h != h
        if bad.any():
            place = torch.where(bad)[0]
            torch._assert(False, f"not a number in row {place[0]}")
        noise = torch.distributions.Normal(h, torch.ones_like(h)).rsample()
        return h + noise


def test_what_a_model_demands_of_data_is_demanded_by_the_graph() -> None:
    found = caught(Demands())
    assert names(found) == []
    for bad in (1e6, float("nan")):
        with pytest.raises(ValueError, match=r"refuses such data at .*test_kept_functions.py:\d+"):
            found.module(torch.full((4, 3), bad))


class WantsGradients(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        h = h.detach()
        h.requires_grad = True
        return h * self.filler


def test_a_tensor_may_be_made_to_require_gradients() -> None:
    assert names(caught(WantsGradients())) == []


# --- what a first call sets up -----------------------------------------------------------------------------------


COLLECTED: contextvars.ContextVar[list[torch.Tensor]] = contextvars.ContextVar("collected")


class InstallsHooks(Base):
    """As transformers' models do: hooks are installed when they are first needed, and a flag remembers it."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        if not getattr(self, "installed", False):
            self.installed = True
            self.inner.register_forward_hook(lambda module, args, output: COLLECTED.get().append(output))
        token = COLLECTED.set(seen)
        h = self.inner(h)
        COLLECTED.reset(token)
        return h + seen[0]

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())


def test_hooks_that_a_first_call_installs_are_there_once() -> None:
    model = InstallsHooks()
    found = capture(model, (rows(),))
    assert names(found) == []
    assert not hasattr(model, "installed")
    assert not model.inner._forward_hooks
    given = found.module(rows())
    torch.testing.assert_close(given, model(rows()), rtol=0, atol=0)


class FirstCallDiffers(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        if not getattr(self, "called", False):
            self.called = True
            return h * 5
        return h


def test_a_first_call_that_computes_something_else_is_kept() -> None:
    found = capture(nn.Sequential(nn.Linear(3, 3), FirstCallDiffers()), (rows(),))
    assert names(found) == ["1"]
    assert found.verify((rows(),)).ok


@functools.lru_cache(maxsize=8)
def table(width: int) -> torch.Tensor:
    return torch.arange(width) * 0.5


class UsesACache(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h + table(h.shape[1])


def test_functions_whose_results_are_cached_are_opened_every_time() -> None:
    table.cache_clear()
    found = caught(UsesACache())
    assert names(found) == []
    assert table.cache_info().currsize == 0


class Clamps(nn.Module):
    """As Swin clamps its windows: at another size it changes what it remembers, for good."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = 2
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] < 6:
            self.shift = 0
        return self.lin(x).roll(self.shift, 1)


def test_what_a_module_remembers_of_sizes_that_were_only_tried_is_forgotten() -> None:
    model = nn.Sequential(Clamps(), Clamps(), Clamps())
    x = torch.randn(4, 6, 3)
    found = capture(model, (x,))
    assert [module.shift for module in model] == [2, 2, 2]
    assert found.verify((x,)).ok


class Remembers(nn.Module):
    """Kept whole, since what it remembers changes with every call; its owner sets that back."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.state: torch.Tensor | float = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = self.lin(x) + self.state
        return self.state


class SetsBack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.remembers = Remembers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.remembers.state = 0.0
        return self.remembers(x) + self.remembers(x)


def test_who_sets_back_what_a_module_remembers_is_kept_with_it() -> None:
    found = capture(nn.Sequential(nn.Linear(3, 3), SetsBack(), nn.Linear(3, 3)), (rows(),))
    assert names(found) == ["1"]
    for _ in range(2):  # a second backward through the state of the first call would fail
        torch.testing.assert_close(found.module(rows()), found.model(rows()), rtol=0, atol=0)
        found.module(rows()).sum().backward()


class Converts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lin = self.lin.to(torch.float32)
        return self.lin(x)


def test_a_module_that_converts_its_layers_is_kept_and_their_parameters_stay_what_they_are() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Converts())
    weight = model[1].lin.weight
    found = caught(model)
    assert names(found) == ["1"]
    assert model[1].lin.weight is weight
    assert type(weight) is nn.Parameter


class StacksParts(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return torch.maximum(*h.chunk(2, dim=0)).repeat(2, 1)


def test_parts_of_a_value_may_be_the_arguments_of_a_call() -> None:
    found = capture(StacksParts(), (rows(),))
    assert found.verify((rows(),)).ok


class ListOfRows(Base):
    """As llava's models do: a list of the rows of a batch, put together again."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        samples = list(h)
        return (
            torch.stack(samples) + torch.cat([*h.unbind(0)]).view(h.shape[0], -1) + torch.stack([*h.split(1, 1)], 0)[0]
        )


def test_a_list_of_all_rows_is_no_matter_of_the_batch_size() -> None:
    found = caught(ListOfRows())
    assert names(found) == []
    assert found.inputs.rows is None


class LengthOfRows(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.last(h) * (2 if len(h) > 6 else 1)


def test_the_length_of_a_batch_is_not_taken_from_the_example() -> None:
    found = caught(nn.Sequential(nn.Linear(3, 3), LengthOfRows()), rows(4))
    assert names(found) == ["1"]


def targets_of(h: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(h)).float()


class LengthInAFunction(Base):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.last(h) + targets_of(h)[:, None]


def test_a_function_that_takes_the_length_of_a_batch_is_kept_alone() -> None:
    assert names(caught(LengthInAFunction())) == ["targets_of()"]
