"""Verification: loss and gradients of the pipeline against the unsplit model in the same microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import StagecutError
from ..structure import map_leaves, unflatten
from .batch import cloned, joined_inputs, rows_of, split_target
from .engine import modes_of
from .program import PipelineSpec
from .requests import StepRequest
from .sharded import dense
from .stage import StageRuntime, isolated_randomness, loss_of
from .unsplit import unsplit
from .weights import rehome

# A gradient that cancels out, such as that of a bias in front of a BatchNorm, is rounding of the terms that it sums up:
# differences of so many units of the last place of the model's largest gradient are no differences.
_ROUNDING = 8
# Below this share of the model's largest gradient a gradient counts as rounding whatever its dtype; and above the other
# none does, which for float16 and bfloat16 is less than those units.
_FLOOR, _CEILING = 1e-3, 2e-2
_RTOL = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class VerifyReport:
    """What verification found.

    ``errors`` holds, per parameter, the largest absolute difference of the gradient over the largest absolute value
    of the reference's gradient. Gradients that are nothing but rounding count as larger: at least a thousandth of the
    largest of any parameter, and so large that eight units of its last place are allowed, up to a fiftieth of it.
    ``reference`` says what it was compared with: ``"model"`` or ``"captured graph"``.
    """

    loss: float
    reference_loss: float
    errors: dict[str, float]
    tolerances: dict[str, float]
    loss_rtol: float
    reference: str

    @property
    def first_difference(self) -> str | None:
        """Return the first parameter whose gradient differs, in the model's order, or None."""
        return next((name for name, error in self.errors.items() if not error <= self.tolerances[name]), None)

    @property
    def loss_error(self) -> float:
        """Return the relative error of the loss."""
        return abs(self.loss - self.reference_loss) / max(abs(self.reference_loss), 1e-30)

    @property
    def worst(self) -> float:
        """Return the largest relative gradient error of any parameter."""
        return max(self.errors.values(), default=0.0)

    @property
    def ok(self) -> bool:
        """Say whether loss and all gradients agree."""
        return self.first_difference is None and self.loss_error <= self.loss_rtol

    def __str__(self) -> str:
        against = f"the unsplit {self.reference}"
        if self.ok:
            return (
                f"exact: loss and {len(self.errors)} gradients equal those of {against} "
                f"(worst relative gradient error {self.worst:.1e}, loss {self.loss_error:.1e})"
            )
        name = self.first_difference
        if name is None:
            return f"the loss differs from that of {against}: {self.loss!r} against {self.reference_loss!r}"
        return (
            f"the gradient of {name!r} differs from that of {against}: relative error {self.errors[name]:.3g}, "
            f"allowed {self.tolerances[name]:.1g}"
        )


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Leave gradients, buffers and random state as they were before the body."""
    gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random_state = torch.get_rng_state()
    for parameter, _, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient, before in gradients:
            _put_back(gradient, before)
            parameter.grad = gradient
        for buffer, before in buffers:
            buffer.data = buffer.data.new_empty(before.shape) if buffer.shape != before.shape else buffer.data
            buffer.copy_(before)
        torch.set_rng_state(random_state)


def _put_back(gradient: torch.Tensor | None, before: torch.Tensor | None) -> None:
    """Give a gradient its values again: it may lie in memory that workers hand gradients over in."""
    if gradient is None or before is None or gradient.layout is not torch.strided:
        return
    if _is_share(gradient) or not torch.equal(gradient, before):
        with torch.no_grad():
            gradient.copy_(before)


@contextmanager
def reference_model(model: nn.Module, state: dict[str, torch.Tensor], device: torch.device) -> Iterator[nn.Module]:
    """Have the unsplit model on one device with all of its values.

    It is the model itself, or a copy where replicas share out its parameters.
    """
    if any(_is_share(parameter) for parameter in model.parameters()):
        yield unsplit(model, state).to(device)
        return
    with _whole(model, state, device):
        yield model


def _is_share(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


@contextmanager
def _whole(model: nn.Module, state: dict[str, torch.Tensor], device: torch.device) -> Iterator[None]:
    """Let parameters and buffers that live on other ranks, or on other devices, be here for the while."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    moved = [
        (tensor, tensor.data, tensor.grad, state[name])
        for name, tensor in own.items()
        if tensor.shape != state[name].shape or tensor.device != device
    ]
    for tensor, _, _, value in moved:
        rehome(tensor, value.detach().to(device, copy=True), None)
    try:
        yield
    finally:
        for tensor, data, gradient, _ in moved:
            rehome(tensor, data, gradient)


@dataclass(frozen=True)
class Gradients:
    """The loss and every parameter's gradient of one step."""

    loss: torch.Tensor
    of: dict[str, torch.Tensor | None]


def gradients_of(model: nn.Module, loss: torch.Tensor) -> Gradients:
    """Copy the gradients that ``model`` has now."""
    return Gradients(loss, {n: None if p.grad is None else dense(p.grad).clone() for n, p in model.named_parameters()})


def reference_step(
    model: nn.Module,
    spec: PipelineSpec,
    request: StepRequest,
    loss_fn: Callable[..., Any] | None,
    n_threads: int,
    n_together: int = 1,
) -> Gradients:
    """Run the unsplit model on the microbatches of ``request``, ``n_together`` as one; changes gradients and buffers.

    It runs with as many threads as a worker has: another number sums in another order, which a deep float32 model with
    BatchNorm over a few rows turns into visible differences.

    Raises:
        StagecutError: the model draws random numbers, and no run of it that draws the same ones could be compared with.
    """
    if spec.random:
        _check_comparable(spec, n_together)
    device, losses = torch.device(spec.devices[0]), []
    with isolated_randomness(True), _threads(n_threads):
        for first in range(0, request.n_microbatches, n_together):
            part = range(first, min(first + n_together, request.n_microbatches))
            if not any(request.weights[m] for m in part):
                continue
            with torch.autocast(device.type, dtype=request.autocast, enabled=request.autocast is not None):
                loss = _weighted_loss(model, spec, request, loss_fn, part)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
    return gradients_of(model, torch.stack(losses).sum())


def _weighted_loss(
    model: nn.Module, spec: PipelineSpec, request: StepRequest, loss_fn: Callable[..., Any] | None, part: range
) -> torch.Tensor:
    """Run the model on some microbatches as one, and add up what each has of the batch's loss."""
    pieces = [request.inputs[m] for m in part]
    inputs = joined_inputs(spec.inputs, pieces)
    output = _forward(model, spec, request, part[0], _on(inputs, spec))
    if loss_fn is None:
        loss: torch.Tensor = loss_of(output) * sum(request.weights[m] for m in part)
        return loss
    sizes = [rows_of(spec.inputs, piece) for piece in pieces]
    outputs = (output,) if len(part) == 1 else split_target(output, sum(sizes), sizes)
    targets = [None if request.targets is None else _on(request.targets[m], spec) for m in part]
    weighted = [(request.weights[m], out, target) for m, out, target in zip(part, outputs, targets)]
    total: torch.Tensor = sum(loss_fn(out, target) * weight for weight, out, target in weighted if weight)
    return total


def _on(values: Any, spec: PipelineSpec) -> Any:
    """Copy values to the device that the reference runs on: the first of the pipeline."""
    device = torch.device(spec.devices[0])
    return map_leaves(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, cloned(values))


def _check_comparable(spec: PipelineSpec, n_together: int) -> None:
    if n_together > 1:
        raise StagecutError(
            "verify() has nothing to compare with: random numbers belong to single microbatches, and "
            f"batchnorm='sync' runs {n_together} of them as one, which no unsplit model does",
            hint="verify with the model's dropout at 0, or with one replica",
        )
    if any(_is_share(tensor) for module in spec.whole.modules.values() for tensor in module.parameters()):
        raise StagecutError(
            "verify() has nothing to compare with: the captured graph, which draws the pipeline's random numbers, has "
            "but a share of the parameters here (shard=True)",
            hint="verify with the model's dropout at 0, or without shard",
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _forward(model: nn.Module, spec: PipelineSpec, request: StepRequest, m: int, inputs: dict[str, Any]) -> Any:
    if spec.random:
        runtime = StageRuntime(spec.whole, torch.device(spec.devices[0]), None)
        runtime.set_modes(modes_of(model))
        runtime.seed.base = request.seed
        return runtime.forward(m, inputs, {}).output
    leaves = [leaf.constant if leaf.graph_input is None else inputs[leaf.graph_input] for leaf in spec.inputs.leaves]
    args, kwargs = unflatten(spec.inputs.structure, leaves)
    return model(*args, **kwargs)


def compare(given: Gradients, reference: Gradients, owned: set[str], rtol: float | None, kind: str) -> VerifyReport:
    """Compare loss and the gradients of the ``owned`` parameters with the reference."""
    errors, tolerances = {}, {}
    largest = max((float(g.abs().max()) for g in reference.of.values() if g is not None and g.numel()), default=0.0)
    for name, expected in reference.of.items():
        if name not in owned:
            continue
        dtype = torch.float32 if expected is None else expected.dtype
        tolerances[name] = rtol if rtol is not None else _RTOL.get(dtype, 1e-4)
        errors[name] = relative_error(given.of[name], expected, _floor(dtype, tolerances[name]) * largest)
    loss_rtol = rtol if rtol is not None else _RTOL.get(reference.loss.dtype, 1e-4)
    return VerifyReport(float(given.loss), float(reference.loss), errors, tolerances, loss_rtol, kind)


def _floor(dtype: torch.dtype, rtol: float) -> float:
    """Return the share of the model's largest gradient below which a gradient is compared as if it were so large."""
    return min(_CEILING, max(_FLOOR, _ROUNDING * torch.finfo(dtype).eps / rtol)) if rtol > 0 else _FLOOR


def relative_error(given: torch.Tensor | None, expected: torch.Tensor | None, floor: float = 0.0) -> float:
    """Return max |given - expected| / max(max |expected|, floor); infinite if only one of them exists.

    The floor matters for gradients that are zero but for rounding, such as that of a bias in front of a BatchNorm.
    """
    if given is None or expected is None:
        return 0.0 if given is expected else float("inf")
    given, expected = given.detach().cpu(), expected.detach().cpu()
    if expected.numel() == 0:
        return 0.0
    difference = (given - expected).abs().max().item()
    if difference == 0.0:
        return 0.0
    scale = max(expected.abs().max().item(), floor)
    return float(difference / scale) if scale > 0 else float("inf")
