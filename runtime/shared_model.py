"""A model in memory that local workers share with their parent: parameters, buffers, and a place for each gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..errors import StageError
from . import accelerators
from .arena import Arena
from .device_arena import DeviceArena
from .engine import model_state
from .program import PipelineSpec, StageSpec
from .shared_gradients import gradient_slot
from .unsynced import Unsynced
from .weights import Weights, materialised, names_of, rehome


@dataclass(frozen=True)
class _Binding:
    """A tensor of the user's model, its home and the address of that, and the device that it came from."""

    name: str
    tensor: torch.Tensor
    shared: torch.Tensor
    address: int
    origin: torch.device


@dataclass(frozen=True)
class Before:
    """What a step changes beside gradients, as it was: buffers, and gradients that go on, by worker and name."""

    buffers: np.ndarray[tuple[int], np.dtype[np.uint8]]
    on_accelerators: list[torch.Tensor]
    gradients: dict[tuple[int, str], torch.Tensor]


class SharedModel:
    """The user's model, its parameters and buffers moved into memory that workers share, in place.

    They stay the same objects, any optimizer works on them, and workers see each update at once. Gradients come back
    through the same memory. The home of a tensor is where the first worker that uses it computes: all CPU workers share
    one arena, a worker on an accelerator has one of its own there. Workers elsewhere that use it too (replicas, and
    stages that share a parameter) have a copy, which follows its home before every step.
    """

    def __init__(self, spec: PipelineSpec, model: nn.Module, weights: Weights | None) -> None:
        self._model = model
        self._names = {id(tensor): name for name, tensor in reversed(list(model_state(model).items()))}
        self.state = {self._names[id(tensor)]: tensor for tensor in model_state(model).values()}
        # By name, who uses it; the first replica of the first stage that does comes first.
        self._users: dict[str, dict[int, None]] = {}
        for stage, owners in zip(spec.stages, spec.layout.workers):
            for name in self._tensors_of(stage):
                self._users.setdefault(name, {}).update(dict.fromkeys(owners))
        workers = range(spec.layout.n_workers)
        self.used = [[name for name, users in self._users.items() if worker in users] for worker in workers]
        self.accelerators = accelerators.of(spec.devices)
        self.device_arenas = {
            worker: self._device_arena(worker, torch.device(device))
            for worker, device in enumerate(spec.devices)
            if accelerators.is_accelerator(device)
        }
        on_cpu = [worker for worker in range(spec.layout.n_workers) if worker not in self.device_arenas]
        used_elsewhere = {name for worker in self.device_arenas for name in self.used[worker]}
        used_here = {name for worker in on_cpu for name in self.used[worker]}
        # Buffers lie side by side, so that they are kept with one copy.
        names = [name for name in self.state if name in used_here or name not in used_elsewhere]
        buffers = [name for name in names if not self.is_parameter(name)]
        tensors = [(name, self.state[name]) for name in names if self.is_parameter(name)]
        tensors += [(name, self.state[name]) for name in buffers]
        tensors += [("progress", torch.empty(spec.layout.n_workers, dtype=torch.int64))]
        tensors += [slot for worker in on_cpu for slot in self._gradient_slots(worker)]
        self.arena = Arena.create(tensors)
        self.progress = np.frombuffer(self.arena.view("progress").numpy(), dtype=np.int64)
        self._slot_views = {
            (worker, name): self._place_of(worker).view(gradient_slot(worker, name))
            for worker, names in enumerate(self.used)
            for name in names
            if self.is_parameter(name)
        }
        self._slot_pointers = {view.data_ptr() for view in self._slot_views.values()}
        self._bindings: list[_Binding] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # home and copy
        for name in self.state:
            self._settle(name)
        self._parameters = [binding for binding in self._bindings if self.is_parameter(binding.name)]
        self._buffers = self.arena.bytes_of(buffers)
        self._device_buffers = [
            b.shared for b in self._bindings if not self.is_parameter(b.name) and b.shared.device.type != "cpu"
        ]
        self.fills: dict[int, list[tuple[str, list[str]]]] = {}
        self._fill(weights)
        self.bind()

    def _gradient_slots(self, worker: int) -> list[tuple[str, torch.Tensor]]:
        return [
            (gradient_slot(worker, name), self.state[name]) for name in self.used[worker] if self.is_parameter(name)
        ]

    def _device_arena(self, worker: int, device: torch.device) -> DeviceArena:
        own = [(name, self.state[name]) for name in self.used[worker]]
        return DeviceArena.create(own + self._gradient_slots(worker), device)

    def _place_of(self, worker: int) -> Arena | DeviceArena:
        return self.device_arenas.get(worker, self.arena)

    def _settle(self, name: str) -> None:
        """Give a tensor its home, and copies where other workers use it."""
        places = {id(place): place for place in map(self._place_of, self._users.get(name, {}))}
        home, *others = list(places.values()) or [self.arena]
        tensor = self.state[name]
        origin = torch.device("cpu") if tensor.is_meta else tensor.device
        shared = home.view(name)
        self._bindings.append(_Binding(name, tensor, shared, shared.data_ptr(), origin))
        self._copies += [(self._bindings[-1].shared, other.view(name)) for other in others]

    def gradient_names(self, worker: int) -> tuple[str, ...]:
        """Name the parameters whose gradients a worker hands over."""
        return tuple(name for name in self.used[worker] if self.is_parameter(name))

    def _tensors_of(self, stage: StageSpec) -> list[str]:
        """Name the model's tensors that a stage uses."""
        tensors = [t for module in stage.modules.values() for t in (*module.parameters(), *module.buffers())]
        tensors += [t for t in stage.attributes.values() if isinstance(t, torch.Tensor)]
        return list({self._names[id(t)]: None for t in tensors if id(t) in self._names})

    @property
    def names(self) -> dict[int, str]:
        """Return the name of each tensor by its identity."""
        return self._names

    def is_parameter(self, name: str) -> bool:
        """Say whether it is a parameter, and not a buffer."""
        return isinstance(self.state[name], nn.Parameter)

    def _fill(self, weights: Weights | None) -> None:
        """Give tensors of the meta device their place; their values come from the worker where that is.

        ``fills`` says which, by worker: tensors with all of their names. What no worker uses is filled here.
        """
        names = names_of(self._model)
        for binding in self._bindings:
            if binding.tensor.is_meta:
                every_name = names[id(binding.tensor)]
                worker = next(iter(self._users.get(binding.name, {})), None)
                if worker is None:
                    assert weights is not None
                    weights.fill(every_name, binding.shared)
                else:
                    self.fills.setdefault(worker, []).append((binding.name, every_name))
                materialised(binding.tensor, binding.shared)

    def bind(self) -> None:
        """Make the arenas the home of every parameter and buffer; repairs what the user replaced since last time."""
        for binding in self._bindings:
            tensor, shared = binding.tensor, binding.shared
            if tensor.data_ptr() == binding.address:
                continue
            if tensor.shape != shared.shape or tensor.dtype != shared.dtype:
                raise StageError(
                    f"{binding.name} was {shared.dtype} {tuple(shared.shape)} when the pipeline was compiled and is "
                    f"{tensor.dtype} {tuple(tensor.shape)} now",
                    hint="call stagecut.compile(...) again after changing the model",
                )
            shared.copy_(tensor.detach())
            _moved(tensor, shared)

    def take_back(self) -> None:
        """Let tensors whose values have not come be without memory again: another start is to find them so."""
        missing = {name for fills in self.fills.values() for name, _ in fills}
        for binding in self._bindings:
            if binding.name in missing:
                materialised(binding.tensor, torch.empty_like(binding.tensor, device="meta"))

    def refresh_copies(self) -> None:
        """Let copies of tensors be what these are now."""
        for home, copy in self._copies:
            copy.copy_(home)

    def give_back(self) -> None:
        """Let what moved to an accelerator live where it came from: a model on several devices runs nowhere else."""
        for binding in self._bindings:
            tensor, shared = binding.tensor, binding.shared
            if shared.device != binding.origin and tensor.data_ptr() == binding.address:
                _moved(tensor, tensor.detach().to(binding.origin))

    def trainable(self) -> frozenset[str]:
        """Name the parameters that require gradients now."""
        return frozenset([b.name for b in self._parameters if b.tensor.requires_grad])

    def versions(self) -> dict[str, int]:
        """Return how often each parameter was changed in place, as autograd counts it."""
        return {b.name: b.tensor._version for b in self._parameters}

    def release_gradient_slots(self) -> None:
        """Copy gradients that the user still holds in ``.grad`` out of the memory that this step will overwrite."""
        for binding in self._parameters:
            gradient = binding.tensor.grad
            if gradient is not None and gradient.data_ptr() in self._slot_pointers:
                binding.tensor.grad = gradient.clone()

    def accept_gradients(self, has_gradient: dict[int, tuple[str, ...]], unsynced: Unsynced | None) -> None:
        """Add what the workers computed to ``.grad``, summed where stages share a parameter; or hold parts of it."""
        parts: dict[str, list[torch.Tensor]] = {}
        for worker in sorted(has_gradient):
            for name in has_gradient[worker]:
                parts.setdefault(name, []).append(self._slot_views[worker, name])
        for binding in self._parameters:
            if binding.name not in parts:
                continue
            tensor, (first, *others) = binding.tensor, parts[binding.name]
            if self.accelerators:
                first = first.to(binding.shared.device)
            if unsynced is not None:
                assert isinstance(tensor, nn.Parameter)
                unsynced.hold(binding.name, tensor, first)
                continue
            for other in others:
                _add(first, other)
            old = tensor.grad
            tensor.grad = first if old is None else old.add_(first)

    def before_a_step(self, goes_on: Sequence[tuple[int, str]]) -> Before:
        """Keep what a step changes; ``goes_on`` says which gradients are added to, by worker and name."""
        gradients = {key: self._slot_views[key].clone() for key in goes_on}
        return Before(self._buffers.copy(), [buffer.clone() for buffer in self._device_buffers], gradients)

    def as_before(self, before: Before) -> None:
        """Undo what a step has changed."""
        np.copyto(self._buffers, before.buffers)
        for buffer, values in zip(self._device_buffers, before.on_accelerators):
            buffer.copy_(values)
        for key, gradient in before.gradients.items():
            self._slot_views[key].copy_(gradient)


def _add(target: torch.Tensor, other: torch.Tensor) -> None:
    """Add as this thread, if NumPy knows the dtype: torch's threads would go on spinning on the workers' cores."""
    if target.device.type == other.device.type == "cpu" and target.dtype in (torch.float32, torch.float64):
        own = target.numpy()
        np.add(own, other.numpy(), out=own)
    else:
        target.add_(other.to(target.device))


def _moved(tensor: torch.Tensor, values: torch.Tensor) -> None:
    gradient = tensor.grad
    rehome(tensor, values, None if gradient is None else gradient.to(values.device))
