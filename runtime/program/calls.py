"""Callables that captured graphs are made of beside torch's own: regions, custom functions, mode switches, checkpoints.

They are plain picklable objects with a name, so that a graph prints as code and travels to other processes.
"""

from __future__ import annotations

import contextlib
import io
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from ...errors import ShapeError
from ...structure import Structure, unflatten


class _Named:
    """A callable that torch.fx can print as a function of this module."""

    __name__: str

    def _name(self, name: str) -> None:
        self.__name__ = self.__qualname__ = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
        self.__module__ = __name__

    def __repr__(self) -> str:
        return self.__name__


class ApplyFunction(_Named):
    """Apply a custom ``torch.autograd.Function``: forward and backward are its own."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self._name(f"apply_{function.__name__}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``function.apply``."""
        return self.function.apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ApplyFunction) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)


class Scripted(_Named):
    """Call a function that ``torch.jit.script`` compiled; unlike the function itself it can be sent to a process."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self._name(f"scripted_{function.name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.function(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        file = io.BytesIO()
        torch.jit.save(self.function, file)
        return {**vars(self), "function": file.getvalue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.function = torch.jit.load(io.BytesIO(state["function"]))  # type: ignore[no-untyped-call]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scripted) and other.function is self.function

    def __hash__(self) -> int:
        return id(self.function)


class Build(_Named):
    """Put an argument of a nested type (a dataclass, a library's own container) together from its leaves."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self._name("build")

    def __call__(self, *leaves: Any) -> Any:
        """Rebuild the value."""
        return unflatten(self.structure, leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Build) and other.structure == self.structure

    def __hash__(self) -> int:
        return hash(self.structure.n_leaves)


class InRegion(_Named):
    """Call a function, a tensor method by name, or a module given as first argument, under a grad mode and autocast.

    ``autocast`` lists (device type, enabled, dtype), outermost first. ``grad`` False is ``torch.no_grad()``;
    ``cudnn`` says whether cuDNN may be used.
    """

    def __init__(
        self,
        grad: bool | None,
        autocast: tuple[tuple[str, bool, str], ...],
        function: Any = None,
        cudnn: bool | None = None,
    ) -> None:
        self.grad, self.autocast, self.function, self.cudnn = grad, autocast, function, cudnn
        called = function if isinstance(function, str) else getattr(function, "__name__", "call")
        parts = [] if grad is None else ["no_grad" if not grad else "enable_grad"]
        parts += [] if cudnn is None else ["cudnn_on" if cudnn else "cudnn_off"]
        parts += [f"autocast_{dtype}" if enabled else "autocast_off" for _, enabled, dtype in autocast[-1:]]
        self._name("_".join([*parts, called]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InRegion) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((self.grad, self.autocast, self.__name__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call under the region."""
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=getattr(torch, dtype), enabled=enabled))
            if self.grad is not None:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.cudnn is not None:
                stack.enter_context(torch.backends.cudnn.flags(enabled=self.cudnn))
            if self.function is None:
                return args[0](*args[1:], **kwargs)
            if isinstance(self.function, str):
                return getattr(args[0], self.function)(*args[1:], **kwargs)
            return self.function(*args, **kwargs)


class Guarded(_Named):
    """Refuse sizes at which the model's Python would have decided otherwise than when it was captured."""

    def __init__(self, comparison: str, outcome: bool, place: str) -> None:
        self.comparison, self.outcome, self.place = comparison, outcome, place
        self._name("guard")

    def __call__(self, left: float, right: float) -> None:
        """Compare again.

        Raises:
            ShapeError: the outcome is another one.
        """
        if bool(getattr(operator, self.comparison)(left, right)) is not self.outcome:
            raise ShapeError(
                f"the model branches on sizes ({self.place}): it was captured where {left} {self.comparison} {right} "
                f"would be {self.outcome}",
                hint="capture it again for these sizes, or keep the module that branches whole with opaque=[...]",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guarded) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((self.comparison, self.outcome, self.place))


class DataCheck(_Named):
    """Refuse data that the model refuses: its own check branches on a tensor, and only raises on the other side."""

    def __init__(self, expected: bool, place: str) -> None:
        self.expected, self.place = expected, place
        self._name("check_data")

    def __call__(self, condition: torch.Tensor) -> None:
        """Check.

        Raises:
            ValueError: the model itself raises for such data.
        """
        if bool(condition) is not self.expected:
            raise ValueError(f"the model refuses such data at {self.place}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataCheck) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((self.expected, self.place))


class ModeSwitch(nn.Module):
    """Give the first value in training mode and the second in evaluation mode: what ``self.training`` decided.

    ``owner`` is the path of the module whose code asked.
    """

    def __init__(self, owner: str = "") -> None:
        super().__init__()
        self.owner = owner

    def forward(self, in_training: Any, in_evaluation: Any) -> Any:
        """Choose by this module's own mode, which follows that of the module whose code asked."""
        return in_training if self.training else in_evaluation


class Checkpointed(nn.Module):
    """Ops that the model put under ``torch.utils.checkpoint``: computed again in the backward instead of kept."""

    def __init__(self, body: fx.GraphModule, preserve_rng_state: bool = True) -> None:
        super().__init__()
        self.body = body
        self.preserve_rng_state = preserve_rng_state

    def forward(self, *args: Any) -> Any:
        """Run the ops under a checkpoint."""
        if not torch.is_grad_enabled():
            return self.body(*args)
        return checkpoint(self.body, *args, use_reentrant=False, preserve_rng_state=self.preserve_rng_state)
