"""A model in memory that local workers share with their parent: parameters, buffers, and a place for each gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..errors import StageError
from .arena import Arena
from .engine import model_state
from .program import PipelineSpec
from .shared_gradients import gradient_slot
from .unsynced import Unsynced
from .weights import Weights, materialised, names_of


@dataclass(frozen=True)
class _Binding:
    """A tensor of the user's model and its home in the arena."""

    name: str
    tensor: torch.Tensor
    shared: torch.Tensor


@dataclass(frozen=True)
class Before:
    """What a step changes beside gradients, as it was: buffers, and gradients that go on, by worker and name."""

    buffers: np.ndarray[tuple[int], np.dtype[np.uint8]]
    gradients: dict[tuple[int, str], torch.Tensor]


class SharedModel:
    """The user's model, its parameters and buffers moved into an arena, in place.

    They stay the same objects, any optimizer works on them, and workers see each update at once. Gradients come back
    through the same memory.
    """

    def __init__(self, spec: PipelineSpec, model: nn.Module, weights: Weights | None) -> None:
        self._model = model
        self._names = {id(tensor): name for name, tensor in reversed(list(model_state(model).items()))}
        self.state = {self._names[id(tensor)]: tensor for tensor in model_state(model).values()}
        self.used = [self._tensors_of(spec, worker) for worker in range(spec.layout.n_workers)]
        self.gradient_slots = {
            (worker, name): gradient_slot(worker, name)
            for worker, names in enumerate(self.used)
            for name in names
            if self.is_parameter(name)
        }
        # Buffers lie side by side, so that they are kept with one copy.
        buffers = [name for name in self.state if not self.is_parameter(name)]
        ordered = [*(name for name in self.state if self.is_parameter(name)), *buffers]
        tensors = [(name, self.state[name]) for name in ordered]
        tensors += [("progress", torch.empty(spec.layout.n_workers, dtype=torch.int64))]
        tensors += [(slot, self.state[name]) for (_, name), slot in self.gradient_slots.items()]
        self.arena = Arena.create(tensors)
        self.progress = np.frombuffer(self.arena.view("progress").numpy(), dtype=np.int64)
        self._slot_views = {key: self.arena.view(slot) for key, slot in self.gradient_slots.items()}
        self._slot_pointers = {view.data_ptr() for view in self._slot_views.values()}
        self._bindings = [_Binding(name, tensor, self.arena.view(name)) for name, tensor in self.state.items()]
        self._buffers = self.arena.bytes_of(buffers)
        self._fill(weights)
        self.bind()

    def _tensors_of(self, spec: PipelineSpec, worker: int) -> list[str]:
        names: dict[str, None] = {}
        for stage, owners in zip(spec.stages, spec.layout.workers):
            if worker in owners:
                tensors = [t for module in stage.modules.values() for t in (*module.parameters(), *module.buffers())]
                tensors += [t for t in stage.attributes.values() if isinstance(t, torch.Tensor)]
                names.update({self._names[id(t)]: None for t in tensors if id(t) in self._names})
        return list(names)

    @property
    def names(self) -> dict[int, str]:
        """Return the name of each tensor by its identity."""
        return self._names

    def is_parameter(self, name: str) -> bool:
        """Say whether it is a parameter, and not a buffer."""
        return isinstance(self.state[name], nn.Parameter)

    def _fill(self, weights: Weights | None) -> None:
        """Give tensors of the meta device their place in the arena, and their values."""
        names = names_of(self._model)
        for binding in self._bindings:
            if binding.tensor.is_meta:
                assert weights is not None
                weights.fill(names[id(binding.tensor)], binding.shared)
                materialised(binding.tensor, binding.shared)

    def bind(self) -> None:
        """Make the arena the home of every parameter and buffer; repairs what the user replaced since last time."""
        for binding in self._bindings:
            tensor, shared = binding.tensor, binding.shared
            if tensor.data_ptr() == shared.data_ptr():
                continue
            if tensor.shape != shared.shape or tensor.dtype != shared.dtype:
                raise StageError(
                    f"{binding.name} was {shared.dtype} {tuple(shared.shape)} when the pipeline was compiled and is "
                    f"{tensor.dtype} {tuple(tensor.shape)} now",
                    hint="call stagecut.compile(...) again after changing the model",
                )
            shared.copy_(tensor.detach())
            tensor.data = shared

    def trainable(self) -> frozenset[str]:
        """Name the parameters that require gradients now."""
        return frozenset(
            b.name for b in self._bindings if isinstance(b.tensor, nn.Parameter) and b.tensor.requires_grad
        )

    def versions(self) -> dict[str, int]:
        """Return how often each parameter was changed in place, as autograd counts it."""
        return {b.name: b.tensor._version for b in self._bindings if isinstance(b.tensor, nn.Parameter)}

    def release_gradient_slots(self) -> None:
        """Copy gradients that the user still holds in ``.grad`` out of the memory that this step will overwrite."""
        for binding in self._bindings:
            gradient = binding.tensor.grad
            if gradient is not None and gradient.data_ptr() in self._slot_pointers:
                binding.tensor.grad = gradient.clone()

    def accept_gradients(self, has_gradient: dict[int, tuple[str, ...]], unsynced: Unsynced | None) -> None:
        """Add what the workers computed to ``.grad``, summed where stages share a parameter; or hold parts of it."""
        parts: dict[str, list[torch.Tensor]] = {}
        for worker in sorted(has_gradient):
            for name in has_gradient[worker]:
                parts.setdefault(name, []).append(self._slot_views[worker, name])
        for binding in self._bindings:
            if binding.name not in parts:
                continue
            first, *others = parts[binding.name]
            if unsynced is not None:
                assert isinstance(binding.tensor, nn.Parameter)
                unsynced.hold(binding.name, binding.tensor, first)
                continue
            for other in others:
                _add(first, other)
            old = binding.tensor.grad
            binding.tensor.grad = first if old is None else old.add_(first)

    def before_a_step(self, goes_on: Sequence[tuple[int, str]]) -> Before:
        """Keep what a step changes; ``goes_on`` says which gradients are added to, by worker and name."""
        return Before(self._buffers.copy(), {key: self._slot_views[key].clone() for key in goes_on})

    def as_before(self, before: Before) -> None:
        """Undo what a step has changed."""
        np.copyto(self._buffers, before.buffers)
        for key, gradient in before.gradients.items():
            self._slot_views[key].copy_(gradient)


def _add(target: torch.Tensor, other: torch.Tensor) -> None:
    """Add as this thread, if NumPy knows the dtype: torch's threads would go on spinning on the workers' cores."""
    if target.dtype in (torch.float32, torch.float64):
        own = target.numpy()
        np.add(own, other.numpy(), out=own)
    else:
        target.add_(other)
