"""Pipelines over accelerators, and over accelerators and CPUs, compute what the unsplit model computes on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dag_models import draw_case, reference, worst_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import stagecut

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("no_workers_left"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
# Of two accelerators a and b, and the CPU: stages, each with the devices of its replicas.
PLACEMENTS = {
    "a": ([["a"]], "1f1b"),
    "a, b": ([["a"], ["b"]], "1f1b"),
    "a, a": ([["a"], ["a"]], "1f1b"),
    "a, cpu": ([["a"], ["cpu"]], "zb-h1"),
    "cpu, a": ([["cpu"], ["a"]], "1f1b"),
    "ab, ab": ([["a", "b"], ["b", "a"]], "1f1b"),
    "ab, cpu": ([["a", "b"], ["cpu"]], "1f1b"),
    "a cpu, cpu b": ([["a", "cpu"], ["cpu", "b"]], "1f1b"),
    "cpu a, cpu cpu": ([["cpu", "a"], ["cpu", "cpu"]], "1f1b"),
}


class Everything(nn.Module):
    """A weight at both ends, a frozen and an unused one, BatchNorm, a mask and positions made on the input's device."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.norm = nn.BatchNorm1d(5)
        self.body[1][1].weight.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + torch.arange(5, device=tokens.device)[:, None] / 10
        for block in self.body:
            x = x + block(x) * self.scale
        mask = torch.tensor([True, True, False, True, True], device=tokens.device)
        return F.linear(self.norm(x).masked_fill(~mask[:, None], 0.0), self.embed.weight)


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(11, (rows, 5), generator=generator), torch.randint(11, (rows, 5), generator=generator)


def placed(stages: list[list[str]], pair: tuple[str, str]) -> list[list[str]]:
    return [[{"a": pair[0], "b": pair[1]}.get(name, name) for name in stage] for stage in stages]


@pytest.fixture(scope="module", params=PLACEMENTS.values(), ids=list(PLACEMENTS))
def pm(request: Any, pair: tuple[str, str]) -> Iterator[stagecut.Pipeline]:
    torch.manual_seed(0)
    stages, schedule = request.param
    with stagecut.compile(
        Everything().double(),
        placed(stages, pair),
        loss_fn=token_loss,
        microbatches=3,
        schedule=schedule,
        costs="analytic",
        timeout_s=60,
    ) as compiled:
        x, y = batch(6)
        compiled.step(x, target=y)
        yield compiled


class Twin:
    """The unsplit model on the CPU, from the pipeline's state, in the same microbatches."""

    def __init__(self, pm: stagecut.Pipeline) -> None:
        self.n_pieces = 3 * pm.plan.layout().n_replicas
        self.model = Everything().double()
        self.model.body[1][1].weight.requires_grad_(False)
        self.model.load_state_dict(pm.state_dict())

    def step(self, rows: int) -> torch.Tensor:
        x, y = batch(rows)
        total = torch.zeros((), dtype=torch.float64)
        sizes = [len(piece) for piece in torch.arange(rows).tensor_split(min(self.n_pieces, rows))]
        for xs, ys in zip(x.split(sizes), y.split(sizes)):
            loss = token_loss(self.model(xs), ys) * len(xs) / rows
            loss.backward()
            total += loss.detach()
        return total


def assert_same_gradients(pm: stagecut.Pipeline, model: nn.Module) -> None:
    for (name, parameter), twin in zip(pm.named_parameters(), model.parameters()):
        assert (parameter.grad is None) == (twin.grad is None), name
        if twin.grad is not None:
            assert parameter.grad.device == parameter.device
            torch.testing.assert_close(parameter.grad.cpu(), twin.grad, rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("rows", [12, 7, 1])
def test_steps_are_exact_and_statistics_too(pm: stagecut.Pipeline, rows: int) -> None:
    twin = Twin(pm)
    pm.zero_grad()
    loss = pm.step(*batch(rows)[:1], target=batch(rows)[1]).loss
    torch.testing.assert_close(loss, twin.step(rows), rtol=1e-10, atol=0)
    assert_same_gradients(pm, twin.model)
    if pm.plan.layout().n_replicas == 1:
        torch.testing.assert_close(pm.model.norm.running_var.cpu(), twin.model.norm.running_var, rtol=1e-10, atol=0)
        assert int(pm.model.norm.num_batches_tracked) == int(twin.model.norm.num_batches_tracked)


def test_optimizers_in_the_parent_move_what_the_workers_use(pm: stagecut.Pipeline) -> None:
    twin = Twin(pm)
    own, other = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (pm, twin.model))
    for rows in (6, 9, 6):
        own.zero_grad()
        other.zero_grad()
        pm.step(batch(rows)[0], target=batch(rows)[1])
        twin.step(rows)
        assert_same_gradients(pm, twin.model)
        torch.testing.assert_close(
            pm.clip_grad_norm_(0.5).cpu(), nn.utils.clip_grad_norm_(twin.model.parameters(), 0.5)
        )
        own.step()
        other.step()
    for parameter, copied in zip(pm.parameters(), twin.model.parameters()):
        torch.testing.assert_close(parameter.detach().cpu(), copied.detach(), rtol=1e-9, atol=1e-12)


def test_gradients_that_replicas_have_not_summed_go_on(pm: stagecut.Pipeline) -> None:
    twin = Twin(pm)
    pm.zero_grad()
    with pm.no_sync():
        pm.step(batch(6)[0], target=batch(6)[1])
        pm.step(batch(9)[0], target=batch(9)[1])
    pm.step(batch(7)[0], target=batch(7)[1])
    for rows in (6, 9, 7):
        twin.step(rows)
    assert_same_gradients(pm, twin.model)


def test_forward_and_backward_by_hand(pm: stagecut.Pipeline) -> None:
    pm.eval()  # so that the result does not depend on the microbatches
    model = copy.deepcopy(Twin(pm).model).eval()
    pm.zero_grad()
    x, y = batch(7)
    output = pm(x)
    loss, wanted = token_loss(output, y), token_loss(model(x), y)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    loss.backward()
    wanted.backward()
    assert_same_gradients(pm, model)
    torch.testing.assert_close(pm.evaluate(x).output, model(x).detach(), rtol=1e-10, atol=1e-13)
    pm.train()


def test_verify_profile_and_the_model_as_a_whole(pm: stagecut.Pipeline) -> None:
    x, y = batch(6)
    pm.zero_grad()
    pm.step(x, target=y)
    before = [None if p.grad is None else p.grad.clone() for p in pm.parameters()]
    assert pm.verify(x, target=y).worst <= 1e-10
    assert {s.op for s in pm.profile(x, target=y, steps=1).timeline.spans} >= {"F"}
    for parameter, gradient in zip(pm.parameters(), before):
        assert parameter.grad is gradient or torch.equal(parameter.grad, gradient)
    whole = pm.to_module().eval()
    assert len({tensor.device for tensor in whole.parameters()}) == 1
    model = Twin(pm).model.eval()
    torch.testing.assert_close(whole(x.to(whole.scale.device)).cpu(), model(x), rtol=1e-10, atol=1e-13)


@settings(max_examples=25, phases=[Phase.generate, Phase.explicit])
@given(data=st.data())
def test_random_models_on_random_devices(pair: tuple[str, str], data: st.DataObject) -> None:
    class Chooser:
        def choose(self, options: Any) -> Any:
            return data.draw(st.sampled_from(list(options)))

    case = draw_case(Chooser(), max_stages=3, replicas=(1, 2), devices=(*pair, "cpu"))
    known = reference(case)
    with stagecut.compile(case.model, list(case.plan.devices), loss_fn=case.loss, plan=case.plan) as pm:
        for _ in range(2):
            pm.zero_grad()
            loss = pm.step(*case.args, target=case.target, **case.kwargs).loss
            assert worst_error(case, loss, known) <= 1e-10
