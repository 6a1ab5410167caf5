"""Worker processes compute what the unsplit model computes, replicas and ties included."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dag_models import RandomChooser, draw_case, worst_error
from torch import nn
from torch.nn import functional as F

import stagecut
from stagecut.runtime.mailbox import LARGE_BYTES

pytestmark = [pytest.mark.usefixtures("no_workers_left"), pytest.mark.filterwarnings("ignore::UserWarning")]


class Tied(nn.Module):
    """Input and output share a weight, across stages; one parameter is frozen, one unused; backwards need a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.body[1][1].weight.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.scale
        for block in self.body:
            x = x + block(x)
        return F.linear(x, self.embed.weight)


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(11, (rows, 5), generator=generator), torch.randint(11, (rows, 5), generator=generator)


def expected(model: nn.Module, rows: int) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model = copy.deepcopy(model)
    model.zero_grad()
    x, y = batch(rows)
    loss = token_loss(model(x), y)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_exact(pm: stagecut.Pipeline, rows: int) -> None:
    wanted_loss, wanted = expected(pm.model, rows)
    pm.zero_grad()
    x, y = batch(rows)
    torch.testing.assert_close(pm.step(x, target=y).loss, wanted_loss, rtol=1e-10, atol=0)
    for name, parameter in pm.named_parameters():
        if wanted[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-10, atol=1e-14, msg=name)


@pytest.fixture(
    scope="module",
    params=[
        ([["cpu"], ["cpu"]], "1f1b"),
        ([["cpu", "cpu"], ["cpu", "cpu"]], "1f1b"),
        ([["cpu", "cpu"], ["cpu"]], "1f1b"),
        ([["cpu", "cpu"], ["cpu", "cpu"]], "zb-v"),  # the tie is on the first worker of each replica, and on no other
    ],
    ids=["2", "2x2", "2+1", "vee x2"],
)
def pm(request: Any) -> Iterator[stagecut.Pipeline]:
    torch.manual_seed(0)
    model = Tied().double()
    devices, schedule = request.param
    with stagecut.compile(
        model, devices, loss_fn=token_loss, microbatches=3, schedule=schedule, costs="analytic"
    ) as compiled:
        yield compiled


@pytest.mark.parametrize("rows", [12, 7, 1])
def test_ties_across_stages_and_ragged_batches(pm: stagecut.Pipeline, rows: int) -> None:
    assert_exact(pm, rows)


def test_gradients_accumulate_over_steps_until_they_are_cleared(pm: stagecut.Pipeline) -> None:
    _, once = expected(pm.model, 6)
    pm.zero_grad()
    x, y = batch(6)
    pm.step(x, target=y)
    pm.step(x, target=y)
    torch.testing.assert_close(pm.get_parameter("body.0.1.weight").grad, 2 * once["body.0.1.weight"])


def test_an_optimizer_in_the_parent_is_seen_by_the_workers(pm: stagecut.Pipeline) -> None:
    optimizer = torch.optim.AdamW(pm.parameters(), 1e-2)
    x, y = batch(6)
    before = pm.step(x, target=y).loss
    optimizer.step()
    optimizer.zero_grad()
    after = pm.step(x, target=y).loss
    assert after < before
    torch.testing.assert_close(after, expected(pm.model, 6)[0])


def test_state_dict_round_trips_with_the_plain_model(pm: stagecut.Pipeline) -> None:
    plain = Tied().double()
    plain.load_state_dict(pm.state_dict())
    with torch.no_grad():
        plain.embed.weight.mul_(2.0)
    pm.load_state_dict(plain.state_dict())
    assert_exact(pm, 6)
    torch.testing.assert_close(pm.get_parameter("embed.weight"), plain.embed.weight)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_gradients_are_clipped_by_the_norm_of_the_whole_model(pm: stagecut.Pipeline, norm_type: float) -> None:
    _, wanted = expected(pm.model, 6)
    given = [gradient for gradient in wanted.values() if gradient is not None]
    norm = torch.nn.utils.get_total_norm(given, norm_type)
    pm.zero_grad()
    x, y = batch(6)
    pm.step(x, target=y)
    torch.testing.assert_close(pm.clip_grad_norm_(float(norm) / 2, norm_type), norm)
    for name, parameter in pm.named_parameters():
        if wanted[name] is not None:
            torch.testing.assert_close(parameter.grad, wanted[name] / 2, rtol=1e-5, atol=1e-12)


def test_the_unsplit_model_comes_back_with_memory_of_its_own(pm: stagecut.Pipeline) -> None:
    alone = pm.to_module()
    x, _ = batch(6)
    torch.testing.assert_close(alone(x), pm.model(x))
    assert [p.requires_grad for p in alone.parameters()] == [p.requires_grad for p in pm.parameters()]
    before = pm.get_parameter("embed.weight").detach().clone()
    with torch.no_grad():
        alone.embed.weight.zero_()
    torch.testing.assert_close(pm.get_parameter("embed.weight").detach(), before)


def test_a_parameter_that_is_frozen_later_gets_no_gradient(pm: stagecut.Pipeline) -> None:
    weight = pm.get_parameter("body.2.1.weight")
    weight.requires_grad_(False)
    try:
        assert_exact(pm, 6)
    finally:
        weight.requires_grad_(True)


def test_forward_and_backward_by_hand(pm: stagecut.Pipeline) -> None:
    wanted_loss, wanted = expected(pm.model, 7)
    pm.zero_grad()
    x, y = batch(7)
    loss = token_loss(pm(x), y)
    loss.backward()
    torch.testing.assert_close(loss.detach(), wanted_loss)
    torch.testing.assert_close(pm.get_parameter("embed.weight").grad, wanted["embed.weight"])


def test_two_forwards_may_wait_for_one_backward(pm: stagecut.Pipeline) -> None:
    pm.zero_grad()
    (xa, ya), (xb, yb) = batch(6), batch(4)
    (token_loss(pm(xa), ya) + token_loss(pm(xb), yb)).backward()
    wanted = expected(pm.model, 6)[1]["embed.weight"] + expected(pm.model, 4)[1]["embed.weight"]
    torch.testing.assert_close(pm.get_parameter("embed.weight").grad, wanted)


def test_a_result_that_is_dropped_frees_its_activations(pm: stagecut.Pipeline) -> None:
    x, y = batch(6)
    pm(x)
    gc.disable()  # nothing hangs in a circle
    try:
        pm(x)
        assert len(pm._forgotten) == 1
    finally:
        gc.enable()
    assert pm.step(x, target=y).loss.item() == pytest.approx(expected(pm.model, 6)[0].item())
    assert not pm._forgotten


def test_evaluate_keeps_no_graph_and_follows_eval_mode(pm: stagecut.Pipeline) -> None:
    pm.eval()
    x, y = batch(7)
    result = pm.evaluate(x, target=y)
    torch.testing.assert_close(result.output, copy.deepcopy(pm.model)(x).detach())
    assert not result.output.requires_grad
    assert not any(module.training for module in pm.modules() if module is not pm)
    pm.train()


def test_verify_leaves_gradients_and_parameters_alone(pm: stagecut.Pipeline) -> None:
    pm.zero_grad()
    x, y = batch(6)
    pm.step(x, target=y)
    before = {name: None if p.grad is None else p.grad.clone() for name, p in pm.named_parameters()}
    report = pm.verify(x, target=y)
    assert report.ok
    assert report.worst <= 1e-10
    for name, parameter in pm.named_parameters():
        assert (parameter.grad is None) == (before[name] is None)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, before[name])


def test_profile_measures_every_compute_once(pm: stagecut.Pipeline) -> None:
    x, y = batch(12)
    timeline = pm.profile(x, target=y, steps=2).timeline
    computes = [
        ("B" if s.op == "I" else s.op, s.stage, s.microbatch) for s in timeline.spans if s.op in ("F", "B", "I")
    ]
    n_stages, n_pieces = len(pm.plan.stages), 3 * pm.plan.layout().n_replicas
    assert sorted(computes) == sorted((op, s, m) for op in "FB" for s in range(n_stages) for m in range(n_pieces))
    assert timeline.source == "measured"


@pytest.mark.parametrize("seed", [0, 4, 11])
def test_random_models_over_processes(seed: int) -> None:
    case = draw_case(RandomChooser(seed), max_stages=3)
    with stagecut.compile(case.model, list(case.plan.devices), loss_fn=case.loss, plan=case.plan) as pm:
        for _ in range(2):
            pm.zero_grad()
            loss = pm.step(*case.args, target=case.target, **case.kwargs).loss
            assert worst_error(case, loss) <= 1e-10


class Bare(nn.Module):
    """The second half has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.sin(self.linear(x)))


def test_replicas_of_a_stage_without_parameters() -> None:
    torch.manual_seed(0)
    model = Bare().double()
    x, y = torch.randn(2, 8, 4, dtype=torch.float64)
    F.mse_loss(model(x), y).backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    with stagecut.compile(
        model, [["cpu", "cpu"]] * 2, loss_fn=F.mse_loss, microbatches=2, costs="analytic", timeout_s=30
    ) as pm:
        for _ in range(2):
            pm.zero_grad()
            pm.step(x, target=y)
            assert min(stage.parameter_bytes for stage in pm.plan.stages) == 0
            for parameter, gradient in zip(pm.parameters(), wanted):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


def test_large_batches_and_results_travel_whole() -> None:
    """Batches and results beyond what a message itself carries, with two forwards waiting for their backwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 300)).double()
    plain = copy.deepcopy(model)
    one, other = torch.randn(2, 96, 256, dtype=torch.float64)
    assert one.nbytes > 3 * LARGE_BYTES
    with stagecut.compile(model, ["cpu", "cpu"], loss_fn=F.mse_loss, microbatches=3, costs="analytic") as pm:
        outputs = [pm(x) for x in (one, other[:40])]
        wanted = [plain(x) for x in (one, other[:40])]
        assert all(torch.allclose(out, want, rtol=1e-12, atol=1e-14) for out, want in zip(outputs, wanted))
        (outputs[0].square().mean() + outputs[1].sum()).backward()
        (wanted[0].square().mean() + wanted[1].sum()).backward()
        for parameter, twin in zip(pm.parameters(), plain.parameters()):
            torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(pm.evaluate(other).output, plain(other).detach(), rtol=1e-12, atol=1e-14)
        assert torch.equal(outputs[0], pm(one)), "a later message leaves results alone"


class Noisy(nn.Module):
    """Dropout as a module and as a function, BatchNorm with its running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.4)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.relu(self.norm(self.first(x))))
        return self.last(F.dropout(x, 0.2, training=self.training))


def steps_of(devices: Any, launch: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model = Noisy().double()
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(3, (12,))
    n_replicas = len(devices[0]) if isinstance(devices[0], list) else 1
    with stagecut.compile(
        model,
        devices,
        loss_fn=F.cross_entropy,
        microbatches=4 // n_replicas,
        schedule="1f1b",
        costs="analytic",
        launch=launch,
    ) as pm:
        torch.manual_seed(5)
        losses = [pm.step(x, target=y).loss.item() for _ in range(3)]
        return losses, {name: value.clone() for name, value in pm.state_dict().items()}


def test_randomness_and_statistics_do_not_depend_on_the_cut() -> None:
    whole_losses, whole_state = steps_of(["cpu"], "inline")
    for devices, launch in (([["cpu"]] * 2, "local"), ([["cpu"]] * 3, "inline")):
        losses, state = steps_of(devices, launch)
        assert losses == pytest.approx(whole_losses, rel=1e-12)
        for name, value in state.items():
            torch.testing.assert_close(value, whole_state[name], rtol=1e-12, atol=1e-14, msg=name)
    assert len(set(whole_losses)) == 3, "each step draws anew"


def test_replicas_draw_the_same_numbers() -> None:
    assert steps_of([["cpu", "cpu"], ["cpu", "cpu"]], "local")[0] == pytest.approx(
        steps_of(["cpu"], "inline")[0], rel=1e-12
    )
