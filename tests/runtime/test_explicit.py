"""Split backwards: explicit graphs give autograd's gradients, and what cannot be recorded runs whole, and says why."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import stagecut
from stagecut.building import tensors_of
from stagecut.partitioner.analysis import analyse
from stagecut.partitioner.configurations import Wishes
from stagecut.partitioner.describe import describe
from stagecut.partitioner.planner import make_plan, random_ops
from stagecut.partitioner.split import split
from stagecut.runtime import recorded
from stagecut.runtime.joint import Joint, cut
from stagecut.runtime.parts import Parts, Untraceable
from stagecut.runtime.recorded import _refuse_shared_memory
from stagecut.runtime.stage import StageRuntime
from stagecut.structure import flatten


class Twice(nn.Module):
    """A weight used twice, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(torch.tanh(self.own(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.own(x.unsqueeze(1).expand(-1, 3, -1))
        return out[:, -1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.norm = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x.view(-1, 1, 6).repeat(1, 4, 1))
        return self.own(tokens, tokens, tokens, need_weights=False)[0].mean(1)


class Pixels(nn.Module):
    """Convolutions with and without bias, BatchNorm's buffers, and a ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 2, 2),
            nn.MaxPool2d(2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(self.layers(x.view(-1, 1, 3, 6).clone()).flatten(1), (0, 2))


class Added(nn.Module):
    """Two weights that get the same gradient tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.a + self.b)


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.own(x), 0.3) + torch.randn_like(x) * 0.1


class Slices(nn.Module):
    """Changes in place of views, whose gradients autograd writes in place too; a sum that a view follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y[:, :2] *= 2
        y[:, 2] = x[:, 0]
        y[:, 4:] += self.b(x)
        y.t()[3].tanh_()
        return y + y.sum(0, keepdim=True).view(6) + x.sum(0, keepdim=True).view(6)


class Skipping(nn.Module):
    """More than one value on the wire, one of them of integers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picked = x.detach().argsort(1)
        y = torch.tanh(x) * 2
        return (y + x.sin()).gather(1, picked)


class Scaled(nn.Module):
    """Views that are not contiguous, a constant, and a buffer that the forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1.0)
        return (self.own(x).t() * torch.tensor(0.5, dtype=x.dtype)).t()


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)),
    "twice": Twice,
    "recurrent": Recurrent,
    "attention": Attention,
    "pixels": lambda: nn.Sequential(nn.Linear(6, 18), Pixels(), nn.LazyLinear(6)),
    "added": Added,
    "random": Random,
    "scaled": Scaled,
    "skipping": Skipping,
    "slices": Slices,
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6), MIDDLES[name](), nn.Tanh(), nn.Linear(6, 6), MIDDLES[name](), nn.Linear(6, 3)
    )
    model(torch.randn(4, 6))
    return model.double()


def batch(rows: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, dtype=torch.float64, generator=generator), torch.arange(rows) % 3


def compiled(model: nn.Module, schedule: str = "zb-h1", **wishes: Any) -> Any:
    wishes = {"microbatches": 3, "launch": "inline", "costs": "analytic", **wishes}
    return stagecut.compile(model, [["cpu"], ["cpu"]], loss_fn=F.cross_entropy, schedule=schedule, **wishes)


def stages_of(pm: Any) -> list[StageRuntime]:
    return [stage for executor in pm._engine._executors for stage in executor.stages.values()]


@pytest.mark.parametrize(("name", "schedule"), [*((name, "zb-h1") for name in MIDDLES), ("attention", "zb-h2")])
def test_split_backwards_give_the_gradients_and_buffers_of_whole_ones(name: str, schedule: str) -> None:
    x, y = batch()
    found = []
    for own in (schedule, "1f1b"):
        model = model_of(name)
        model[0].weight.requires_grad_(False)
        with compiled(model, own) as pm:
            for step in range(2):
                torch.manual_seed(step)
                pm.step(x + step, target=y)
            assert all(stage.whole_because is None for stage in stages_of(pm))
            found.append((pm.verify(x, target=y, raises=False), copy.deepcopy(model)))
    (check, ours), (_, theirs) = found
    assert check.worst <= 1e-10, check
    for (parameter, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), parameter
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12, msg=parameter)
    for (buffer, value), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=0, msg=buffer)


def test_worker_processes_split_backwards_too_with_replicas() -> None:
    x, y = batch(12)
    model = model_of("linear")
    with compiled(model, launch="local", stages=2) as pm:
        assert pm.verify(x, target=y).worst <= 1e-10
    wishes = {"loss_fn": F.cross_entropy, "schedule": "zb-h1", "microbatches": 2, "costs": "analytic"}
    with stagecut.compile(model_of("scaled"), [["cpu", "cpu"], ["cpu", "cpu"]], **wishes) as pm:
        assert pm.verify(x, target=y).worst <= 1e-10
        pm.step(x[:3], target=y[:3])
        assert pm.verify(x, target=y).worst <= 1e-10


def test_values_of_one_packet_do_not_overlap_and_views_of_one_tensor_do() -> None:
    torch.manual_seed(0)
    packet = torch.zeros(20)
    _refuse_shared_memory([packet[:10].view(2, 5), 3, packet[10:], torch.zeros(4), torch.zeros(0)])
    with pytest.raises(Untraceable, match="two of its inputs overlap in memory"):
        _refuse_shared_memory([packet[:11], packet[10:]])


def test_a_stage_that_cannot_be_recorded_keeps_nothing_of_earlier_steps() -> None:
    x, y = batch()
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), Branching(), nn.Linear(6, 3)).double()
    with compiled(model, "1f1b") as pm:
        pm.prepare(x)
        stages = stages_of(pm)
        for stage in stages:
            stage.steady = True
        for _ in range(4):
            pm.step(x, target=y)
        gc.collect()
        alive = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        for _ in range(4):
            pm.step(x, target=y)
        gc.collect()
        assert sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) <= alive
        assert pm.verify(x, target=y).worst <= 1e-10


@pytest.mark.parametrize("devices", [[["cpu"], ["cpu"]], [["cpu", "cpu"], ["cpu"]]])
def test_steps_that_come_up_again_are_recorded_and_stay_exact(devices: list[list[str]]) -> None:
    x, y = batch(12)
    model = model_of("pixels")
    model[0].weight.requires_grad_(False)
    wishes: Any = {"loss_fn": F.cross_entropy, "schedule": "1f1b", "microbatches": 2, "costs": "analytic"}
    with stagecut.compile(model, devices, **wishes) as pm:
        for _ in range(5):
            assert pm.verify(x, target=y).worst <= 1e-10
        pm.step(x, target=y)
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        pm.step(x, target=y)  # adds to what is there
        for name, gradient in before.items():
            torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient, rtol=1e-9, atol=1e-12, msg=name)
        assert model[0].weight.grad is None


@pytest.mark.parametrize("splits", [True, False])
def test_a_stage_without_weights_has_gradients_of_its_inputs_only(splits: bool) -> None:
    x, _ = batch()
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    captured = stagecut.capture(model, (x,))
    ops = [node.name for node in captured.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    wishes = Wishes(
        n_microbatches=1, schedule="1f1b", costs="analytic", assignment={name: s for s, name in enumerate(ops)}
    )
    plan = make_plan(captured, [x], describe([["cpu"]] * 3), wishes)
    spec = split(captured, plan, random_ops(analyse(captured, [x], len(x))))
    stage = StageRuntime(spec.stages[1], torch.device("cpu"), None, steady=True)
    given = torch.randn(10, 6, dtype=torch.float64)
    (name,) = spec.stages[1].wires_in[0].values
    for _ in range(4):
        stage.begin(splits, trains=True, n_microbatches=4)
        held = stage.forward(0, {}, {name: (given, True)})
        (root,) = held.results.values()
        if splits:
            stage.backward_input(0, [root], [torch.ones_like(root)])
            stage.backward_weight(0)
        else:
            stage.backward(0, [root], [torch.ones_like(root)])
        torch.testing.assert_close(held.leaves[name].grad, 1 - torch.tanh(given) ** 2)
    assert held.apart is not None


def test_a_recording_that_does_not_run_is_left_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    model = model_of("pixels")
    state = copy.deepcopy(dict(model.named_buffers()))

    def broken(*given: Any) -> Parts:
        parts = cut(*given)

        def fails(*values: Any) -> list[Any]:
            raise RuntimeError("view size is not compatible with input tensor's size and stride")

        return replace(parts, backward_weight=fails)

    monkeypatch.setattr("stagecut.runtime.joint.cut", broken)
    with compiled(model) as pm:
        with pytest.warns(UserWarning, match="what was recorded does not run: RuntimeError: view size"):
            assert pm.verify(x, target=y).worst <= 1e-10
        for name, value in model.named_buffers():
            assert torch.equal(value, state[name]), name
        pm.step(x, target=y)
        plain = model_of("pixels")
        for xs, ys in zip(x.tensor_split(3), y.tensor_split(3)):
            F.cross_entropy(plain(xs), ys).backward()
        for (name, own), other in zip(model.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(own, other, msg=name)


def test_what_a_recording_was_made_of_is_gone_when_it_is_made() -> None:
    x, y = batch()
    with compiled(model_of("linear"), "1f1b") as pm:
        pm.step(x, target=y)
        gc.collect()
        before = sum(type(thing) is FakeTensor for thing in gc.get_objects())
        gc.disable()  # what is gone now is gone at once, and not by chance
        try:
            stages = stages_of(pm)
            for stage in stages:
                stage.steady = True
            for _ in range(4):
                pm.step(x, target=y)
            assert all(stage.explicit._known for stage in stages)
            kept = [type(thing) for thing in gc.get_objects()]
        finally:
            gc.enable()
    assert Joint not in kept
    assert kept.count(FakeTensor) <= before


def test_the_whole_graph_of_a_recording_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    compiled_first: list[bool] = []

    def looked_at(joint: Joint, *given: Any) -> Parts:
        parts = cut(joint, *given)
        assert isinstance(joint.module, _LazyGraphModule), "make_fx compiled it"
        compiled_first.append(not joint.module._needs_recompile())
        return parts

    monkeypatch.setattr("stagecut.runtime.joint.cut", looked_at)
    with compiled(model_of("linear")) as pm:
        pm.step(x, target=y)
    assert compiled_first == [False] * 4  # two stages, microbatches of two sizes


def test_gradients_in_another_layout_are_brought_into_the_recorded_one() -> None:
    x, _ = batch()
    stage, packets = middle_stage(model_of("linear"), x)
    found = []
    for splits in (True, False):
        stage.module.zero_grad()
        stage.begin(splits, trains=True, n_microbatches=4)
        held = stage.forward(0, {}, packets)
        roots = [value for value in held.results.values() if value.requires_grad]
        weird = [torch.arange(float(root.numel())).double().view(root.t().shape).t() for root in roots]
        stage.backward(0, roots, weird)
        found.append([weight.grad for weight in stage.module.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(4, 6), nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.table(tokens)))


def test_an_error_in_a_recorded_op_names_its_module() -> None:
    model = Embedded().double()
    x, y = torch.arange(6) % 4, torch.arange(6) % 3
    with compiled(model, microbatches=2) as pm:
        pm.step(x, target=y)
        with pytest.raises(IndexError) as caught:
            pm.step(x + 1, target=y)
        assert "module table" in str(caught.value.stagecut)


class Branching(nn.Module):
    """Code that has to run at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.own(x)
        return -y if y.mean() > 0 else y


def test_a_stage_with_opaque_code_runs_its_backward_whole_and_the_other_does_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), Branching(), nn.Linear(6, 3)).double()
    x, y = batch()
    with compiled(model) as pm:
        with pytest.warns(UserWarning, match=r"stage \d runs its backward whole: .*is kept whole"):
            pm.step(x, target=y)
        assert pm.verify(x, target=y).worst <= 1e-10
        reasons = [stage.whole_because for stage in stages_of(pm)]
        assert sorted(reason is None for reason in reasons) == [False, True]
        planned = [stage.backward_weight_s > 0 for stage in pm.plan.stages]
        assert planned == [reason is None for reason in reasons]


def test_recomputing_stages_run_their_backward_whole() -> None:
    x, y = batch()
    with compiled(model_of("random"), recompute=True) as pm:
        with pytest.warns(UserWarning, match="computes its activations again"):
            pm.step(x, target=y)
        assert pm.verify(x, target=y).worst <= 1e-10


def test_hooks_on_parameters_are_called_once_a_microbatch() -> None:
    x, y = batch()
    model = model_of("linear")
    calls: list[float] = []
    model[3].weight.register_hook(lambda gradient: calls.append(float(gradient.sum())) or gradient * 2)
    with compiled(model) as pm:
        pm.step(x, target=y)
        assert len(calls) == 3
        assert all(stage.whole_because is None for stage in stages_of(pm))
        doubled = model[3].weight.grad.clone()
    plain = model_of("linear")
    F.cross_entropy(plain(x), y).backward()
    torch.testing.assert_close(doubled, 2 * plain[3].weight.grad, rtol=1e-10, atol=1e-12)


def test_hooks_and_attributes_of_modules_that_come_later_are_seen() -> None:
    x, y = batch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU(0.1), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with compiled(model) as pm:
        pm.step(x, target=y)
        model[1].negative_slope = 0.7
        assert pm.verify(x, target=y).worst <= 1e-10
        calls: list[int] = []
        model[3].register_forward_hook(lambda *given: calls.append(1))
        with pytest.warns(UserWarning, match="has hooks"):
            pm.step(x, target=y)
        assert len(calls) == 3


def test_changed_shapes_modes_and_frozen_weights_are_recorded_anew() -> None:
    x, y = batch()
    model = model_of("pixels")
    with compiled(model) as pm:
        pm.step(x, target=y)
        pm.step(x[:7], target=y[:7])
        assert pm.verify(x[:7], target=y[:7]).worst <= 1e-10
        model.eval()
        assert pm.verify(x, target=y).worst <= 1e-10
        model.train()
        model[3].weight.requires_grad_(False)
        model.zero_grad()
        assert pm.verify(x, target=y).worst <= 1e-10
        pm.step(x, target=y)
        assert model[3].weight.grad is None
        assert model[3].bias.grad is not None


def test_autocast_is_part_of_the_recording() -> None:
    x, y = (part.float() if part.is_floating_point() else part for part in batch())
    model = model_of("linear").float()
    with compiled(model) as pm:
        pm.step(x, target=y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert pm.verify(x, target=y).ok
        assert pm.verify(x, target=y).ok


def test_losses_that_weigh_nothing_leave_no_gradient() -> None:
    x, y = batch()
    model = model_of("linear")
    with compiled(model, loss_weight=lambda target: 0.0 if int(target[0]) == 0 else 1.0, microbatches=5) as pm:
        pm.step(x, target=y)
        assert pm.verify(x, target=y).worst <= 1e-10


def middle_stage(model: nn.Module, x: torch.Tensor) -> tuple[StageRuntime, dict[str, Any]]:
    """Return the middle stage of three and packets for it."""
    wishes: Any = {"costs": "analytic", "microbatches": 1, "schedule": "1f1b"}
    plan = stagecut.plan(model, [["cpu"]] * 3, example_inputs=(x,), **wishes)
    captured = stagecut.capture(model, (x,))
    spec = split(captured, plan, random_ops(analyse(captured, tensors_of(captured, (x,), {}), len(x))))
    first, own = (StageRuntime(spec.stages[s], torch.device("cpu"), None) for s in (0, 1))
    results = first.forward(0, dict.fromkeys(first.spec.graph_inputs, x), {}).results
    return own, {name: (results[name].detach(), True) for group in own.spec.wires_in for name in group.values}


def test_input_gradients_release_what_weight_gradients_do_not_need() -> None:
    x, _ = batch()
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(6, 6), nn.GELU())]
    stage, packets = middle_stage(nn.Sequential(*layers).double(), x)
    stage.begin(splits=True, trains=True, n_microbatches=4)
    held = stage.forward(0, {}, packets)
    assert held.apart is not None
    saved = {value.data_ptr(): weakref.ref(value) for value in held.apart.saved if value.dim() == 2}
    roots = [value for value in held.results.values() if value.requires_grad]
    stage.backward_input(0, roots, [torch.ones_like(root) for root in roots])
    assert all(weight.grad is None for weight in stage.module.parameters())
    assert all(leaf.grad is not None for leaf in held.leaves.values())
    gc.collect()
    needed = {value.data_ptr() for value in held.apart.saved}
    alive = {place for place, reference in saved.items() if reference() is not None}
    assert alive - needed <= {value.data_ptr() for value in (*held.leaves.values(), *held.results.values())} | {
        weight.data_ptr() for weight in stage.module.parameters()
    }
    assert alive != set(saved)
    stage.backward_weight(0)
    assert held.apart.saved == []
    given = [weight.grad.clone() for weight in stage.module.parameters()]
    stage.module.zero_grad()
    stage.begin(splits=False, trains=True, n_microbatches=4)
    held = stage.forward(0, {}, packets)
    roots = [value for value in held.results.values() if value.requires_grad]
    stage.backward(0, roots, [torch.ones_like(root) for root in roots])
    for own, weight in zip(given, stage.module.parameters(), strict=True):
        torch.testing.assert_close(own, weight.grad, rtol=1e-12, atol=1e-14)


def test_a_backward_as_a_whole_of_a_recorded_stage_is_the_sum_of_its_parts() -> None:
    x, _ = batch()
    stage, packets = middle_stage(model_of("pixels"), x)
    found = []
    for splits in (True, False):
        stage.module.zero_grad()
        stage.begin(splits, trains=True, n_microbatches=4)
        for m in range(2):
            held = stage.forward(m, {}, packets)
            assert (held.apart is not None) == splits
            roots = [value for value in held.results.values() if value.requires_grad]
            stage.backward(m, roots, [torch.ones_like(root) for root in roots])
        inputs = [leaf.grad for leaf in held.leaves.values()]
        found.append([*inputs, *(weight.grad for weight in stage.module.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class Live(TorchDispatchMode):
    """Counts the bytes of the results of ops that somebody holds; ``peak`` has the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}  # of each storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in flatten(result)[0]:
            if isinstance(leaf, torch.Tensor):
                place, n_bytes = leaf.untyped_storage().data_ptr(), leaf.untyped_storage().nbytes()
                self.now += 0 if self._holders.get(place) else n_bytes
                self._holders[place] = self._holders.get(place, 0) + 1
                weakref.finalize(leaf, self._gone, place, n_bytes)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, place: int, n_bytes: int) -> None:
        self._holders[place] -= 1
        self.now -= 0 if self._holders[place] else n_bytes


def test_a_rehearsal_holds_what_one_microbatch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """It held the activations of two, and a plan that just fits would not have."""
    peaks = []
    rehearse = recorded._rehearse

    def watched(*args: Any) -> None:
        with Live() as live:
            rehearse(*args)
        peaks.append(live.peak)

    monkeypatch.setattr(recorded, "_rehearse", watched)
    x = torch.randn(256, 6, dtype=torch.float64)
    layers = [layer for _ in range(24) for layer in (nn.Linear(6, 6), nn.GELU())]
    stage, packets = middle_stage(nn.Sequential(*layers).double(), x)
    stage.begin(splits=True, trains=True, n_microbatches=4)
    with Live() as live:
        held = stage.forward(0, {}, packets)
        roots = [value for value in held.results.values() if value.requires_grad]
        stage.backward(0, roots, [torch.ones_like(root) for root in roots])
        stage.free(0)
        live.peak = live.now
        held = stage.forward(1, {}, packets)
        roots = [value for value in held.results.values() if value.requires_grad]
        stage.backward(1, roots, [torch.ones_like(root) for root in roots])
    assert peaks[0] <= 1.25 * live.peak
    assert peaks[0] > 16 * x.numel() * 8, "it does run"
