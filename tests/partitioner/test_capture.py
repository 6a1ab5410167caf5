"""Capture: the graph computes what the model computes, and the model is left as it was."""

from __future__ import annotations

import inspect
import os
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from few_rows import rows
from torch import nn

from stagecut.errors import CaptureError
from stagecut.models.transformer import GPT
from stagecut.models.unet import UNet
from stagecut.partitioner.analysis import analyse
from stagecut.partitioner.capture import Capture, capture
from stagecut.runtime.program.calls import ModeSwitch
from stagecut.structure import flatten


class Body(nn.Module):
    """A layer whose forward is given as a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def between(function: Callable[..., Any], **attributes: Any) -> nn.Sequential:
    """The layer between two others, so that there is something to cut if it is kept whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), Body(function, **attributes), nn.Linear(3, 3))


def assert_same(a: Any, b: Any) -> None:
    ours, structure = flatten(a)
    theirs, other = flatten(b)
    assert structure == other
    assert [type(leaf) for leaf in ours] == [type(leaf) for leaf in theirs]
    for x, y in zip(ours, theirs):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y


def assert_faithful(model: nn.Module, caught: Capture, *args: Any, **kwargs: Any) -> None:
    """Results, gradients and changed buffers of graph and model are equal, from equal seeds, in both modes."""
    for training in (True, False):
        caught.module.train(training)
        model.train(training)
        outcomes = []
        for run in (model, caught.module):
            buffers = [buffer.clone() for buffer in model.buffers()]
            model.zero_grad()
            seed()
            result = run(*args, **kwargs)
            roots = [leaf for leaf in flatten(result)[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            sum((root.float() ** 2).sum() for root in roots).backward() if roots else None
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            outcomes.append((result, gradients, [buffer.clone() for buffer in model.buffers()]))
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), buffers):
                    buffer.copy_(before)
        (expected, wanted, after), (given, gradients, after_too) = outcomes
        assert_same(given, expected)
        assert_same(gradients, wanted)
        assert_same(after_too, after)
    model.zero_grad()


def seed() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- opened ------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass
class Output:
    logits: Any
    hidden: Any = None
    note: str = "n"


def skips(self: Body, x: torch.Tensor) -> torch.Tensor:
    a = self.lin(x)
    b = torch.relu(a)
    c = self.lin(b)
    return torch.cat([a, c + x], dim=1)[:, :3] * b


def chunks(self: Body, x: torch.Tensor) -> torch.Tensor:
    n = x.shape[1]
    first, second = x[:, : n // 3], x[:, n // 3 :]
    return self.lin(torch.cat([second, first], dim=-1)).view(x.size(0), -1)


def rows_are_free(self: Body, x: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return self.lin(x) + positions.expand(x.shape[0], 3) * 0.1 + x.new_zeros(x.shape[0], 3)


def dropout(self: Body, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(self.lin(x), 0.5, training=self.training)


def draws(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) + torch.randn_like(x)


def reads_a_number(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) * x.max().item()


def keeps_a_path_from_gradients(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x).detach() + x


def writes_in_place(self: Body, x: torch.Tensor) -> torch.Tensor:
    y = self.lin(x)
    z = y
    y += 1
    y.mul_(2)
    return F.relu_(y) + z


def assigns_to_slices(self: Body, x: torch.Tensor) -> torch.Tensor:
    y = self.lin(x)
    y[:, 0] = 0
    y[:1] = y[:1] * 2
    return y


RESULTS: dict[str, Callable[[Any, Any], Any]] = {
    "a tensor": lambda h, x: h,
    "a tuple": lambda h, x: (h, x),
    "a list": lambda h, x: [h, x],
    "one tensor in a tuple": lambda h, x: (h,),
    "a dictionary": lambda h, x: {"logits": h, "inner": {"x": x}},
    "an ordered dictionary": lambda h, x: OrderedDict(b=h, a=x),
    "a named tuple": lambda h, x: Point(h, [x]),
    "a dataclass": lambda h, x: Output(h, (x, None)),
    "constants": lambda h, x: (h, None, 3, "s", True, 0.5),
    "an input": lambda h, x: (x, h),
    "the same value twice": lambda h, x: (h, h),
    "a shape": lambda h, x: (h, h.shape[1]),
    "a mode": lambda h, x: (h, h.mean()),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_keep_their_structure(kind: str) -> None:
    model = Body(lambda self, x: RESULTS[kind](self.lin(x), x))
    with silent():
        caught = capture(model, (rows(),))
    assert caught.opaque == ()
    assert_faithful(model, caught, rows(5))


class Arguments(nn.Module):
    """Takes arguments of every form."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Any, pair: Any, mask: Any = None, *, scale: int = 2, table: Any = None, **more: Any) -> Any:
        y = self.lin(x) * scale + pair["a"] - pair["b"][0]
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        if table is not None:
            y = y + table
        return y * more.get("factor", 1.0)


def test_arguments_of_every_form_are_taken() -> None:
    model = Arguments()
    mask = torch.tensor([[True], [False], [True], [False]])
    pair = {"a": rows(), "b": (rows() + 1,)}
    with silent():
        caught = capture(model, (rows(), pair), {"mask": mask, "scale": 3, "table": torch.ones(3), "factor": 0.5})
    assert caught.opaque == ()
    assert [(leaf.path, leaf.constant, leaf.batched) for leaf in caught.inputs.leaves] == [
        ("x", None, True),
        ("pair_0", None, True),
        ("pair_1", None, True),
        ("mask", None, True),
        ("scale", 3, False),
        ("table", None, False),
        ("factor", 0.5, False),
    ]
    assert_faithful(model, caught, rows(), pair, mask, scale=3, table=torch.ones(3), factor=0.5)
    two = {"a": rows(2), "b": (rows(2) + 1,)}
    assert_faithful(model, caught, rows(2), two, mask=mask[:2], table=torch.zeros(3), scale=3, factor=0.5)


def test_none_and_numbers_are_part_of_the_graph() -> None:
    model = Arguments()
    pair = {"a": rows(), "b": (rows(),)}
    caught = capture(model, (rows(), pair, None), {"scale": 5})
    assert caught.opaque == ()
    assert [leaf.constant for leaf in caught.inputs.leaves if leaf.graph_input is None] == [None, 5]
    assert not [node for node in caught.graph.nodes if node.target == "masked_fill"]
    assert_faithful(model, caught, rows(), pair, None, scale=5)


def test_arguments_that_are_called_like_pythons_own_names_are_taken() -> None:
    model = Body(lambda self, x: self.lin(x["input"]) + x["class"])
    caught = capture(model, ({"input": rows(), "class": rows()},))
    assert_faithful(model, caught, {"input": rows(3), "class": rows(3)})


def test_a_switch_chooses_what_the_modules_mode_decided() -> None:
    model = between(dropout)
    caught = capture(model, (rows(),))
    (switch,) = (path for path, module in caught.graph_module.named_children() if isinstance(module, ModeSwitch))
    assert caught.mode_owners[switch] == "1"
    module = caught.graph_module.get_submodule(switch)
    assert module.train()("yes", "no") == "yes"
    assert module.eval()("yes", "no") == "no"


@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_capture_is_in_the_mode_of_the_model(training: bool) -> None:
    model = between(dropout).train(training)
    caught = capture(model, (rows(),))
    seed()
    expected = model(rows())
    seed()
    assert_same(caught.module(rows()), expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.full((3,), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)) * self.scale + self.offset
        return self.last(F.linear(self.norm(self.first(x)), self.first.weight))


def test_tied_weights_modules_called_twice_and_batchnorm_are_kept() -> None:
    model = Tied()
    with silent():
        caught = capture(model, (rows(),))
    assert caught.opaque == ()
    assert_faithful(model, caught, rows(5))
    assert caught.graph_module.get_submodule("first") is model.first
    assert len(list(caught.graph_module.parameters())) == len(list(model.parameters()))


def test_forward_hooks_are_kept_on_layers_containers_and_the_model() -> None:
    model = between(skips)
    model[0].register_forward_hook(lambda module, args, result: result * 2)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.register_forward_hook(lambda module, args, result: (result, args[0]))
    expected = model(rows())
    caught = capture(model, (rows(),))
    assert caught.opaque == ()
    assert_same(caught.module(rows()), expected)
    assert_faithful(model, caught, rows())


@pytest.mark.parametrize("place", ["0", "1", ""])
def test_backward_hooks_are_kept(place: str) -> None:
    model = between(skips)
    model.get_submodule(place).register_full_backward_hook(lambda module, inputs, outputs: tuple(g * 2 for g in inputs))
    caught = capture(model, (rows(),))
    x, y = rows().requires_grad_(), rows().requires_grad_()
    model(x).sum().backward()
    caught.module(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (UNet(1, 1, 4, 2), torch.randn(2, 1, 8, 8)),
        (GPT(vocab=17, d_model=8, n_layers=2, n_heads=2, max_len=6), torch.randint(0, 17, (2, 6))),
    ],
    ids=["unet", "transformer"],
)
def test_the_reference_models_are_opened(model: nn.Module, x: torch.Tensor) -> None:
    with silent():
        caught = capture(model, (x,))
    assert caught.opaque == ()
    assert_faithful(model, caught, x)


# --- kept whole --------------------------------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 3  # another factor than the forward's: a trace through it would lose it


def branches_on_data(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) if x.sum() > 0 else x


def loops_over_data(self: Body, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([self.lin(row) for row in x])


def computes_with_numbers(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) * max(0.5, float(x.detach().abs().max()))


def draws_outside(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) + torch.rand(3)


def custom_backward(self: Body, x: torch.Tensor) -> torch.Tensor:
    return Twice.apply(self.lin(x))


def without_gradients(self: Body, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = self.lin(x)
    return y + x


def under_autocast(self: Body, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.lin(x)
    return y.float()


def counts(self: Body, x: torch.Tensor) -> torch.Tensor:
    self.n += 1
    return self.lin(x) * self.n


def counts_then_branches(self: Body, x: torch.Tensor) -> torch.Tensor:
    self.n += 1
    return self.lin(x) if x.sum() > 0 else x


def counts_privately(self: Body, x: torch.Tensor) -> torch.Tensor:
    self._n += 1
    return self.lin(x)


def appends(self: Body, x: torch.Tensor) -> torch.Tensor:
    self.history["seen"].append(x.shape[0])
    return self.lin(x)


def counts_in_a_dictionary(self: Body, x: torch.Tensor) -> torch.Tensor:
    self.history["n"] = self.history.get("n", 0) + 1
    return self.lin(x) * self.history["n"]


def remembers(self: Body, x: torch.Tensor) -> torch.Tensor:
    self.last = self.lin(x)
    return self.last


def replaces_a_buffer(self: Body, x: torch.Tensor) -> torch.Tensor:
    self.total = self.total + x.detach().mean()
    return self.lin(x) + self.total


def draws_python_numbers(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) * random.random()


def draws_numpy_numbers(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) * float(np.random.rand())


def goes_through_numpy(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) + torch.from_numpy(np.sign(x.detach().numpy()))


def another_graph_in_evaluation(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(torch.tanh(x)) if self.training else self.lin(x)


OPENED = [
    skips,
    chunks,
    rows_are_free,
    dropout,
    draws,
    draws_outside,
    custom_backward,
    without_gradients,
    under_autocast,
    another_graph_in_evaluation,
    keeps_a_path_from_gradients,
    writes_in_place,
    assigns_to_slices,
]


@pytest.mark.parametrize("function", OPENED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_torch_code_is_opened_and_kept(function: Callable[..., Any], training: bool) -> None:
    model = between(function).train(training)
    with silent():
        caught = capture(model, (rows(),))
    assert caught.opaque == ()
    assert_faithful(model, caught, rows())
    for n in (1, 2, 7):
        assert_faithful(model, caught, rows(n))


WHOLE: list[tuple[Callable[..., Any], str]] = [
    (branches_on_data, "branches on a tensor's data"),
    (loops_over_data, "makes other calls for another size"),
    (computes_with_numbers, "reads the data of a tensor"),
    (reads_a_number, "reads a number out of a tensor"),
    (counts, "changes its own attribute 'n'"),
    (counts_then_branches, "branches on a tensor's data"),
    (counts_privately, "changes its own attribute '_n'"),
    (appends, "changes its own attribute 'history'"),
    (counts_in_a_dictionary, "changes its own attribute 'history'"),
    (remembers, "changes its own attribute 'last'"),
    (replaces_a_buffer, "changes its own attribute 'total'"),
    (draws_python_numbers, "Python's random module"),
    (draws_numpy_numbers, "from numpy"),
    (goes_through_numpy, "reads the data of a tensor (numpy)"),
]


def whole_model(function: Callable[..., Any]) -> nn.Sequential:
    model = between(function, n=0, _n=0, history={"seen": []}, last=None)
    model[1].register_buffer("total", torch.zeros(3))
    return model


@pytest.mark.parametrize(("function", "reason"), WHOLE, ids=lambda f: getattr(f, "__name__", ""))
def test_what_a_trace_would_lose_is_kept_whole_and_nothing_else_is(function: Callable[..., Any], reason: str) -> None:
    model = whole_model(function)
    with silent():
        caught = capture(model, (rows(),))
    (call,) = caught.opaque
    assert (call.path, call.type_name) == ("1", "Body")
    assert reason in call.reason
    assert [node.target for node in caught.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert f"opaque 1 (Body): {call.reason}" in caught.report()
    if "count" not in function.__name__ and function not in (replaces_a_buffer, draws_python_numbers):
        assert_faithful(model, caught, rows())
        assert_faithful(model, caught, -rows(3))


def test_the_innermost_module_is_kept_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Body(skips), Body(branches_on_data)))
    assert [call.path for call in capture(model, (rows(),)).opaque] == ["1.1"]


def test_a_model_that_cannot_be_opened_is_one_call() -> None:
    model = Body(branches_on_data)
    with silent():
        caught = capture(model, (rows(),))
    assert [call.path for call in caught.opaque] == [""]
    assert [node.op for node in caught.graph.nodes] == ["placeholder", "call_module", "output"]
    assert "opaque (the whole model) (Body)" in caught.report()
    assert_faithful(model, caught, rows())
    assert_faithful(model, caught, -rows(2))


def test_a_result_may_have_another_form_in_evaluation() -> None:
    model = Body(lambda self, x: {"train": self.lin(x)} if self.training else {"eval": self.lin(x), "more": x * 2})
    caught = capture(model, (rows(),))
    assert caught.opaque == ()
    assert_faithful(model, caught, rows(5))
    assert set(caught.module.train()(rows())) == {"train"}
    assert set(caught.module.eval()(rows())) == {"eval", "more"}


class LosesItsLoss(nn.Module):
    """As the parts of torchvision's detectors: in evaluation there is no loss to look up."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.lin(x) * float(x.detach().abs().max())
        return h, ({"loss": h.sum()} if self.training else {})


class AddsLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = LosesItsLoss()

    def forward(self, x: torch.Tensor) -> Any:
        h, losses = self.part(x)
        return {"total": losses["loss"] * 2} if self.training else [h]


def test_what_an_opaque_module_returns_in_one_mode_only_is_looked_up_in_that_mode() -> None:
    model = AddsLosses()
    caught = capture(model, (rows(),))
    assert [call.path for call in caught.opaque] == ["part"]
    assert_faithful(model, caught, rows())


def test_modules_can_be_kept_whole_on_request() -> None:
    model = between(skips)
    caught = capture(model, (rows(),), opaque=["1"])
    assert [(call.path, call.reason) for call in caught.opaque] == [("1", "asked for")]
    assert_faithful(model, caught, rows())
    with pytest.raises(CaptureError, match=r"opaque names '1\.x', which is not a module of Sequential"):
        capture(model, (rows(),), opaque=["1.x"])


def test_a_graph_that_computes_something_else_is_noticed_and_the_model_kept_whole() -> None:
    calls: list[int] = []

    def grows(self: Body, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)  # outside of the module: tracing cannot see it
        return self.lin(x) * len(calls)

    model = between(grows)
    with pytest.warns(UserWarning, match="computed something else than the model"):
        caught = capture(model, (rows(),))
    assert [(call.path, call.reason) for call in caught.opaque] == [
        ("", "the captured graph computed something else than the model")
    ]


def test_a_model_that_fails_on_its_inputs_is_refused() -> None:
    with pytest.raises(CaptureError, match="fails on the example inputs by itself"):
        capture(nn.Linear(3, 3), (torch.zeros(4, 5),))


@pytest.mark.parametrize("args", [(), (torch.tensor(1.0),), (3,)])
def test_a_call_without_a_batch_is_refused(args: tuple[Any, ...]) -> None:
    with pytest.raises(CaptureError, match="no tensor argument with a batch dimension"):
        capture(Body(lambda self, x=None: x), args)


# --- the user's model --------------------------------------------------------------------------------------------


def attributes(model: nn.Module) -> dict[str, Any]:
    """All that the modules hold, containers opened, tensors by identity and value."""

    def seen(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: seen(item) for key, item in value.items()}
        if isinstance(value, (list, set, tuple)):
            return [seen(item) for item in value]
        if isinstance(value, torch.Tensor):
            return id(value), value.detach().clone().numpy().tobytes(), value.requires_grad, value.grad is None
        return id(value) if isinstance(value, nn.Module) or callable(value) else value

    return {path: seen(vars(module)) for path, module in model.named_modules()}


def random_states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2:], torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("function", [*OPENED, *(function for function, _ in WHOLE)], ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_capture_and_analysis_leave_the_model_and_the_random_state_as_they_were(
    function: Callable[..., Any], training: bool
) -> None:
    model = nn.Sequential(*whole_model(function), nn.BatchNorm1d(3)).train(training)
    model[0].eval()
    model[2].weight.requires_grad_(False)
    states, before = random_states(), attributes(model)
    caught = capture(model, (rows(),))
    assert attributes(model) == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analyse(caught, [rows()], 2)
    assert attributes(model) == before
    assert random_states() == states


def test_a_failing_capture_leaves_the_random_state_as_it_was() -> None:
    def draws_and_fails(self: Body, x: torch.Tensor) -> torch.Tensor:
        random.random()
        np.random.rand()
        torch.rand(1)
        raise ValueError("no")

    states = random_states()
    with pytest.raises(CaptureError):
        capture(between(draws_and_fails), (rows(),))
    assert random_states() == states


# --- sources -----------------------------------------------------------------------------------------------------


def test_every_op_knows_the_line_that_made_it() -> None:
    facts = analyse(capture(between(skips), (rows(),)), [rows()], 2)
    lines, first = inspect.getsourcelines(skips)
    by_line: dict[int, list[str]] = {}
    for own in facts.values():
        if own.module_path.startswith("1") and own.op != "call_module":
            file, _, line = (own.source or "").rpartition(":")
            assert os.path.samefile(file, __file__)
            by_line.setdefault(int(line) - first, []).append(own.name)
    assert {lines[line].strip().split(" =")[0].split("(")[0]: names for line, names in by_line.items()} == {
        "b": ["relu"],
        "return torch.cat": ["add", "cat", "getitem", "mul"],
    }
    assert facts["_1_lin"].source == f"{__file__}:{first + 1}"
    assert facts["_1_lin"].module_path == "1.lin"


def test_modules_report_where_they_are_in_the_model() -> None:
    facts = analyse(capture(whole_model(branches_on_data), (rows(),)), [rows()], 2)
    assert [(own.target, own.module_path) for own in facts.values() if own.op == "call_module"] == [
        ("0", "0"),
        ("1", "1"),
        ("2", "2"),
    ]
