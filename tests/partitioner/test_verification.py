"""``capture.verify()``: a right graph passes, a wrong one is found, and model, arguments and random state stay."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import weight_norm
from torch.utils.checkpoint import checkpoint

from stagecut.errors import CaptureError
from stagecut.partitioner.capture import Capture, capture
from stagecut.partitioner.comparing import relative_error
from stagecut.partitioner.verification import CaptureCheck, copied


class Body(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, x, *args, **kwargs)


def between(function: Callable[..., Any], **attributes: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), Body(function, **attributes), nn.Linear(3, 3))


def rows(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(n))


def tripled(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) * 3


def change(caught: Capture, target: Any, index: int, value: Any) -> Capture:
    """Change an argument of the op ``target`` in all graphs of a capture."""
    changed = 0
    for module in {caught.graph_module, caught.union}:
        for node in module.graph.nodes:
            if node.target is target or node.target == target:
                args = list(node.args)
                args[index] = value
                node.args = tuple(args)
                changed += 1
        module.recompile()
    assert changed
    return caught


# --- right graphs ----------------------------------------------------------------------------------------------------


def drops(self: Body, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(self.lin(x), 0.5, self.training)


def normalises(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.norm(self.lin(x))


def recomputes(self: Body, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(self.lin, x, use_reentrant=False)


def branches(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) if x.sum() > 0 else -self.lin(x)


def counts(self: Body, x: torch.Tensor) -> torch.Tensor:
    self.n += 1
    return self.lin(x) * self.n


def averages(self: Body, x: torch.Tensor) -> torch.Tensor:
    self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return self.lin(x) + self.mean


def differs_by_mode(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.lin(x) if self.training else self.lin(x).exp()


@pytest.mark.parametrize(
    "function", [tripled, drops, normalises, recomputes, branches, counts, averages, differs_by_mode]
)
def test_a_right_graph_passes(function: Callable[..., Any]) -> None:
    model = between(function, norm=nn.BatchNorm1d(3), n=0)
    model[1].register_buffer("mean", torch.zeros(3))
    check = capture(model, (rows(),)).verify((rows(),))
    assert check.ok
    assert check.worst == 0.0
    assert check.differences == check.skipped == ()
    assert check.checked == ("training", "evaluation", "training with 2 rows", "evaluation with 2 rows")
    assert str(check) == (
        "the graph does what the model does (worst relative error 0.0e+00) in "
        "training, evaluation, training with 2 rows and evaluation with 2 rows"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_are_compared_in_their_own_dtype(dtype: torch.dtype) -> None:
    model = between(tripled).to(dtype)
    assert capture(model, (rows().to(dtype),)).verify((rows().to(dtype),)).ok


def test_a_model_that_is_kept_whole_passes() -> None:
    model = Body(branches)
    assert capture(model, (rows(),)).verify((rows(),)).ok


def test_nested_results_and_arguments() -> None:
    def nested(self: Body, x: torch.Tensor, *, table: dict[str, Any]) -> dict[str, Any]:
        return {"y": self.lin(x) * table["scale"], "rest": (x, None, table["k"])}

    table = {"scale": torch.tensor(2.0, requires_grad=True), "k": 3}
    caught = capture(Body(nested), (rows(),), {"table": table})
    assert caught.verify((rows(),), {"table": table}).ok
    assert table["scale"].grad is None


def test_the_number_of_rows_can_be_chosen() -> None:
    caught = capture(between(tripled), (rows(),))
    assert caught.verify((rows(),), rows=9).checked[2:] == ("training with 9 rows", "evaluation with 9 rows")
    assert caught.verify((rows(1),)).checked[2] == "training with 4 rows"


def test_modes_that_are_mixed_now_are_checked_too() -> None:
    model = between(normalises, norm=nn.BatchNorm1d(3))
    model[1].norm.eval()
    check = capture(model, (rows(),)).verify((rows(),))
    assert check.ok
    assert "the model's present modes" in check.checked


def test_computed_weights_do_not_stand_in_the_way() -> None:
    with pytest.warns(FutureWarning):
        model = nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    model(rows())
    assert capture(model, (rows(),)).verify((rows(),)).ok


# --- wrong graphs ----------------------------------------------------------------------------------------------------


def test_a_wrong_constant_is_found_and_the_first_parameter_named() -> None:
    caught = change(capture(between(tripled), (rows(),)), operator.mul, 1, 3.3)
    check = caught.verify((rows(),))
    assert not check.ok
    assert check.worst == pytest.approx(0.1, abs=0.01)
    assert check.differences[0].startswith("training: the result differs: relative error 0.")
    assert str(check).startswith(
        "the graph differs from the model: training: the gradient of parameter '0.weight' differs: relative error 0.1, "
        "allowed 0.0001 (and "
    )
    assert {text.split(":")[0] for text in check.differences} == {
        "training", "training, call 2", "evaluation", "training with 2 rows", "evaluation with 2 rows"
    }  # fmt: skip


def test_double_precision_is_held_to_more() -> None:
    single = change(capture(between(tripled), (rows(),)), operator.mul, 1, 3.0 * (1 + 1e-6))
    assert single.verify((rows(),)).ok
    model = between(tripled).double()
    double = change(capture(model, (rows().double(),)), operator.mul, 1, 3.0 * (1 + 1e-6))
    check = double.verify((rows().double(),))
    assert not check.ok
    assert check.worst == pytest.approx(1e-6, rel=0.5)


def test_a_lost_gradient_is_found() -> None:
    caught = capture(between(tripled), (rows(),))
    for module in {caught.graph_module, caught.union}:
        for node in list(module.graph.nodes):
            if node.target is operator.mul:
                with module.graph.inserting_after(node):
                    cut = module.graph.call_method("detach", (node,))
                node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
        module.recompile()
    check = caught.verify((rows(),))
    assert check.worst == float("inf")
    assert "training: the gradient of parameter '0.weight' is None instead of a tensor" in check.differences


def test_a_lost_write_to_a_buffer_is_found() -> None:
    model = between(averages)
    model[1].register_buffer("mean", torch.zeros(3))
    caught = change(capture(model, (rows(),)), "add_", 1, 0.0)
    assert any("buffer '1.mean' after the call differs" in text for text in caught.verify((rows(),)).differences)


def test_what_only_evaluation_does_wrong_is_found() -> None:
    caught = change(capture(between(differs_by_mode), (rows(),)), "exp", 0, None)
    for node in caught.union.graph.nodes:
        if node.target == "exp":
            node.target, node.args = "neg", (node.prev,)
    check = caught.verify((rows(),))
    assert not check.ok
    assert {text.split(":")[0] for text in check.differences} == {"evaluation", "evaluation with 2 rows"}


def test_what_only_another_batch_size_does_wrong_is_found() -> None:
    def sums(self: Body, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * x.shape[0]

    caught = change(capture(between(sums), (rows(),)), operator.mul, 1, 4)
    check = caught.verify((rows(),))
    assert {text.split(":")[0] for text in check.differences} == {"training with 2 rows", "evaluation with 2 rows"}


def test_what_only_other_random_numbers_show_is_found() -> None:
    def noisy(self: Body, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * torch.rand(1)

    caught = capture(between(noisy), (rows(),))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = torch.rand(1)
    caught = change(caught, operator.mul, 1, float(drawn))
    assert caught.verify((rows(),), seeds=[0]).ok
    assert {text.split(":")[0] for text in caught.verify((rows(),)).differences} == {"training, call 2"}


def test_a_graph_that_fails_is_a_difference() -> None:
    caught = change(capture(between(tripled), (rows(),)), operator.mul, 1, "nonsense")
    check = caught.verify((rows(),))
    assert "the graph differs from the model: training: the graph raises TypeError" in str(check)


# --- what cannot be compared -----------------------------------------------------------------------------------------


def test_sizes_that_the_graph_refuses_are_left_out() -> None:
    def small(self: Body, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) if x.shape[0] < 100 else x

    check = capture(Body(small), (rows(),)).verify((rows(),), rows=200)
    assert check.ok
    assert check.checked == ("training", "evaluation")
    assert "not compared: training with 200 rows (the graph refuses: ShapeError:" in str(check)


def test_a_model_that_differs_from_itself_cannot_be_compared() -> None:
    def wild(self: Body, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * self.draw()

    model = between(wild, draw=lambda: int.from_bytes(os.urandom(4), "big"))
    with pytest.warns(UserWarning, match="kept whole"):
        caught = capture(model, (rows(),))
    check = caught.verify((rows(),))
    assert not check.ok
    assert str(check).startswith("nothing was compared: training (the model gives other results each time")


def test_arguments_that_do_not_fit() -> None:
    caught = capture(between(tripled), (rows(),))
    check = caught.verify((torch.randn(4, 5),))
    assert not check.ok
    assert str(check).startswith("nothing was compared: training (the model raises RuntimeError: ")


def test_a_model_without_data_is_refused() -> None:
    model = between(tripled).to("meta")
    caught = capture(model, (torch.empty(4, 3, device="meta"),))
    with pytest.raises(CaptureError, match="has no numbers to compare"):
        caught.verify((torch.empty(4, 3, device="meta"),))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Unique:
        def __deepcopy__(self, memo: Any) -> Unique:
            raise TypeError("there is only one")

    caught = capture(between(tripled, thing=Unique()), (rows(),))
    with pytest.raises(CaptureError, match=r"cannot be copied, .*there is only one"):
        caught.verify((rows(),))


# --- nothing is changed ----------------------------------------------------------------------------------------------

seen: list[int] = []


def leaves_traces(self: Body, x: torch.Tensor, notes: list[Any]) -> torch.Tensor:
    self.n += 1
    seen.append(1)
    notes.append(1)
    x.mul_(1.5)
    return F.dropout(self.norm(self.lin(x)))


def test_model_arguments_and_random_state_stay_as_they_are() -> None:
    model = Body(leaves_traces, norm=nn.BatchNorm1d(3), n=0)
    caught = capture(model, (rows(), []))
    model.lin.weight.grad = torch.ones(3, 3)
    model.eval()
    x, notes, state = rows(), [], {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert caught.verify((x, notes)).ok
    assert torch.equal(x, rows())
    assert (notes, seen, model.n, x.grad) == ([], [], 0, None)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.lin.weight.grad, torch.ones(3, 3))
    assert model.lin.bias.grad is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def tensors_of(module: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def test_a_copy_refers_to_itself_and_not_to_the_original() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"body": Body(recomputes), "rest": nn.BatchNorm1d(3)}))
    model[1].forward = lambda x: model[1]["rest"](model[1]["body"](x))
    model = nn.Sequential(nn.Linear(3, 3), Body(normalises, norm=nn.BatchNorm1d(3)), Body(recomputes), Body(branches))
    caught = capture(model, (rows(),))
    twin = copied(caught)
    assert not set(tensors_of(twin.model)) & set(tensors_of(model))
    for graph_module in (twin.graph_module, twin.union):
        assert isinstance(graph_module, fx.GraphModule)
        assert set(tensors_of(graph_module)) <= set(tensors_of(twin.model))
    with torch.no_grad():
        twin.model[0].weight.zero_()
    assert torch.equal(twin.module(rows()), twin.model(rows()))
    assert not torch.equal(twin.module(rows()), caught.module(rows()))


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "given", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.25),
        ([0.0, 0.0], [0.0, 1e-9], 1e-6),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0, float("inf")], [1.0, float("inf")], 0.0),
        ([1.0, float("inf")], [1.0, -float("inf")], float("inf")),
        ([4.0, float("inf")], [5.0, float("inf")], 0.25),
        ([], [], 0.0),
    ],
)
def test_relative_errors(expected: list[float], given: list[float], error: float) -> None:
    floor = 1e-3
    assert relative_error(torch.tensor(expected), torch.tensor(given), floor) == pytest.approx(error)


def test_numbers_without_a_point_must_be_equal() -> None:
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert relative_error(torch.tensor([1j]), torch.tensor([1.5j])) == pytest.approx(0.5)


def test_the_check_reads_well_with_one_difference() -> None:
    check = CaptureCheck(0.5, ("training: the result differs",), ("training",))
    assert str(check) == "the graph differs from the model: training: the result differs"
    assert not check.ok
