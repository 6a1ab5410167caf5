"""Weights of a model that was made on the meta device: filled in where each stage runs.

A model under ``with torch.device("meta"):`` has shapes and no memory. Its tensors get memory when an engine knows who
owns them, and their values from safetensors files or a checkpoint, read one tensor at a time, or from the modules' own
``reset_parameters``.
"""

from __future__ import annotations

import copy
import gc
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ..errors import CheckpointError, ConstraintError
from .weight_files import Files

INIT = "init"


class Weights(Protocol):
    """Where values come from."""

    def fill(self, names: Iterable[str], target: torch.Tensor) -> None:
        """Write the values of the tensor that has these names into ``target``, of its shape.

        Raises:
            CheckpointError: they are not known, or of another shape.
        """

    def agree(self, common: Callable[[int], int]) -> None:
        """Let every process that fills replicas of the same tensors fill them alike.

        ``common`` returns rank 0's number on every rank: a collective call, that all ranks make.
        """

    def part(self, names: Iterable[str]) -> Weights:
        """Return what fills the tensors that have these names alike, to send to the process where they live."""


def weights_of(source: str | Path, model: nn.Module) -> Weights:
    """Return the weights that a user asked for: ``"init"``, a safetensors file, a folder of such, or of checkpoints.

    Raises:
        CheckpointError: there is no such file, or the newest whole checkpoint is of another model.
    """
    from .checkpoint.weights import CheckpointWeights, has_checkpoint  # workers need not know it

    if source == INIT:
        return Initialised(model, int(torch.randint(2**31, ()).item()))
    path = Path(source)
    if has_checkpoint(path):
        return CheckpointWeights(path, model)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise CheckpointError(f"no safetensors file at {path}", hint="weights='model.safetensors', or a folder of them")
    return Files.of(files)


def check_weights(model: nn.Module, given: bool) -> None:
    """Refuse a model without memory, if nothing says where its values are to come from, or one with memory, if it does.

    Raises:
        ConstraintError: see above.
    """
    on_meta = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if on_meta and not given:
        raise ConstraintError(
            f"{on_meta[0]} and {len(on_meta) - 1} more tensors of the model are on the meta device, without values",
            hint="stagecut.compile(..., weights='model.safetensors'), or weights='init' for reset_parameters()",
        )
    if given and not on_meta:
        raise ConstraintError(
            "weights= is for models on the meta device, and this one has values already",
            hint="make it under torch.device('meta'), or leave out weights= and call model.load_state_dict(...)",
        )


def materialised(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Give a tensor of the meta device the memory of ``values``; it stays the same object."""
    if weakref.getweakrefs(tensor):
        gc.collect()  # fake tensors of the capture refer to it, and torch swaps nothing that is referred to
    made = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values.detach()
    torch.utils.swap_tensors(tensor, made)  # type: ignore[no-untyped-call]


def rehome(tensor: torch.Tensor, values: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Let a tensor live in the memory of ``values``, with ``gradient`` on the same device; it stays the same object."""
    tensor.grad = None
    tensor.data = values
    tensor.grad = gradient


class Initialised:
    """What modules' ``reset_parameters`` make of their tensors, the same whoever asks for whichever of them."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._seed = seed
        self._owner: dict[str, tuple[str, str, nn.Module]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for name in [*module._parameters, *module._buffers]:
                self._owner[f"{path}.{name}" if path else name] = (path, name, module)
        self._made: tuple[str, nn.Module] | None = None

    def part(self, names: Iterable[str]) -> Initialised:
        """Return the seed and the modules that own these, without values, and without the modules inside of them."""
        part = copy.copy(self)
        part._made, part._owner = None, {}
        alone: dict[int, nn.Module] = {}
        for name in names:
            path, own, module = self._owner[name]
            if id(module) not in alone:
                alone[id(module)] = _alone(module, torch.device("meta"))
            part._owner[name] = (path, own, alone[id(module)])
        return part

    def agree(self, common: Callable[[int], int]) -> None:
        """Take rank 0's seed."""
        self._seed, self._made = common(self._seed), None

    def fill(self, names: Iterable[str], target: torch.Tensor) -> None:
        """Let the owner of the tensor initialise it; of several owners the first."""
        path, name, module = self._owner[next(iter(names))]
        if self._made is None or self._made[0] != path:
            self._made = (path, self._initialised(path, module))
        with torch.no_grad():
            target.copy_(getattr(self._made[1], name))

    def _initialised(self, path: str, module: nn.Module) -> nn.Module:
        reset: Callable[[], None] | None = getattr(type(module), "reset_parameters", None)
        if reset is None:
            raise CheckpointError(
                f"module {path or 'of the model itself'} ({type(module).__name__}) has no reset_parameters()",
                hint="stagecut.compile(..., weights='model.safetensors'), or give it that method",
            )
        alone = _alone(module, torch.device("cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self._seed}/{path}".encode()))
            alone.reset_parameters()  # type: ignore[operator]
        return alone


def _alone(module: nn.Module, device: torch.device) -> nn.Module:
    """Copy a module without the modules inside of it, with tensors that have no values yet."""
    alone = copy.copy(module)
    alone._modules = {}
    alone._parameters = {
        n: p if p is None else nn.Parameter(_empty(p, device), p.requires_grad) for n, p in module._parameters.items()
    }
    alone._buffers = {n: b if b is None else _empty(b, device) for n, b in module._buffers.items()}
    return alone


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def fill_in(model: nn.Module, weights: Weights | None) -> None:
    """Give all tensors of the meta device memory of their own, and their values."""
    names = names_of(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:
            assert weights is not None, "check_weights has seen to it"
            values = _empty(tensor, torch.device("cpu"))
            weights.fill(names[id(tensor)], values)
            materialised(tensor, values)


def names_of(model: nn.Module) -> Mapping[int, list[str]]:
    """List the names of every parameter and buffer, by its id."""
    found: dict[int, list[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        found.setdefault(id(tensor), []).append(name)
    return found
