"""Callables that captured graphs are made of beside torch's own: regions, custom functions, mode switches, checkpoints.

They are plain picklable objects with a name, so that a graph prints as code and travels to other processes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from ...errors import ShapeError
from ...structure import Structure, flatten, unflatten


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


def form_of(result: Any) -> tuple[Structure, tuple[str, ...]]:
    """Describe a result: how it is nested, and which of its leaves are tensors, numbers or None."""
    leaves, structure = flatten(result)
    kinds = (torch.Tensor, int, float, type(None))
    return structure, tuple(next((kind.__name__ for kind in kinds if isinstance(leaf, kind)), "") for leaf in leaves)


class SameForm(_Named):
    """Refuse a result of an opaque module that has another form than when the model was captured: None, say."""

    def __init__(self, form: Any, path: str) -> None:
        self.form, self.path = form, path
        self._name("check_form")

    def __call__(self, result: Any) -> None:
        """Check.

        Raises:
            ShapeError: the graph goes on from another form.
        """
        if form_of(result) != self.form:
            raise ShapeError(
                f"the opaque module {self.path!r} returned {', '.join(form_of(result)[1])} where it returned "
                f"{', '.join(self.form[1])} when the model was captured, and the graph goes on from that",
                hint="keep the module around it whole: opaque=[...] takes its path",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameForm) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((self.form[1], self.path))


class KeptFunction(_Named):
    """Call a function of the model's code as it is: the graph does not see what it does.

    ``form`` is that of the result when the model was captured.
    """

    form: Any = None

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._name(f"kept_{function.__name__}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it.

        Raises:
            ShapeError: the result has another form than when the model was captured.
        """
        return self._checked(self.function(*args, **kwargs))

    def _checked(self, result: Any) -> Any:
        if self.form is not None and form_of(result) != self.form:
            raise ShapeError(
                f"{self.function.__qualname__} returned {', '.join(form_of(result)[1])} where it returned "
                f"{', '.join(self.form[1])} when the model was captured, and the graph goes on from that",
                hint="keep the module that calls it whole: opaque=[...] takes its path",
            )
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeptFunction) and type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(self.function)


class KeptMethod(KeptFunction):
    """Call a method of a module of the model as it is, without the module: with the attributes that it reads.

    Attributes:
        attributes: plain values by name; ``given`` names those that every call passes in: tensors, and ``training``.
        away: attributes that are out of reach; to read one is an error, as is to set any.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        cls: type[nn.Module],
        attributes: dict[str, Any],
        away: frozenset[str],
        given: tuple[str, ...] = (),
    ) -> None:
        super().__init__(function)
        self.cls, self.attributes, self.away, self.given = cls, attributes, away, given

    def __call__(self, values: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        """Call it with values for ``given``.

        Raises:
            ShapeError: the result has another form than when the model was captured.
        """
        attributes = Attributes({**self.attributes, **dict(zip(self.given, values))}, self.away)
        return self._checked(self.on(attributes, *args, **kwargs))

    def on(self, attributes: Attributes, *args: Any, **kwargs: Any) -> Any:
        """Call it on a module that has ``attributes`` and nothing else."""
        module = object.__new__(self.cls)
        own = {"_parameters": {}, "_buffers": attributes, "_modules": Attributes({}, self.away)}
        module.__dict__.update(own)
        result = self.function(module, *args, **kwargs)
        if module.__dict__.keys() != own.keys():
            raise OutOfReach(f"{self.function.__name__} sets attributes of its {self.cls.__name__}")
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeptMethod) or other.attributes.keys() != self.attributes.keys():
            return False
        same = all(other.attributes[name] is value for name, value in self.attributes.items())
        mine, theirs = ((m.function, m.form, m.cls, m.away, m.given) for m in (self, other))
        return same and mine == theirs

    def __hash__(self) -> int:
        return hash((self.function, self.cls, self.given))


class OutOfReach(RuntimeError):
    """A method that is kept whole wants more of its module than it is given."""


class Attributes(dict[str, Any]):
    """Attributes by name that can only be read, and of which those in ``away`` cannot even be asked for."""

    def __init__(self, known: dict[str, Any], away: frozenset[str]) -> None:
        super().__init__(known)
        self.away = away

    def __contains__(self, name: object) -> bool:
        if name in self.away:
            raise OutOfReach(f"a method that is kept whole reads the attribute {name!r}, which it has not read before")
        return super().__contains__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        raise OutOfReach(f"a method that is kept whole sets the attribute {name!r}")

    def items(self) -> Any:
        """Refuse: it would list too few."""
        raise OutOfReach("a method that is kept whole lists the parameters or modules of its module")

    __iter__ = keys = values = items


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


class Settled(_Named):
    """Refuse sizes for which a tensor that only sizes decide is another than when the model's Python read it."""

    def __init__(self, value: Any, place: str) -> None:
        self.value, self.place = value, place
        self._name("settled")

    def __call__(self, tensor: torch.Tensor) -> None:
        """Read it again.

        Raises:
            ShapeError: it is another one.
        """
        value = tensor.tolist()
        if value != self.value:
            raise ShapeError(
                f"the model reads a tensor that sizes decide ({self.place}): {value}, but {self.value} when captured",
                hint="capture it again for these sizes, or keep the module that reads whole with opaque=[...]",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settled) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((repr(self.value), self.place))


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


class Folded(nn.Module):
    """Ops of a graph that run as one."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body

    def with_body(self, body: fx.GraphModule) -> Folded:
        """Return one like this that runs other ops."""
        other = copy.copy(self)
        other.__dict__["_modules"] = {"body": body}
        return other


class Skippable(Folded):
    """Ops that run while a random number says so; else values from before stand in for theirs (LayerDrop)."""

    def __init__(self, body: fx.GraphModule, outcome: bool) -> None:
        super().__init__(body)
        self.outcome = outcome

    def forward(self, condition: torch.Tensor, instead: tuple[Any, ...], *args: Any) -> Any:
        """Run the ops if ``condition`` is ``outcome``; without data, they run: it is the costlier side."""
        if not isinstance(condition, FakeTensor) and not condition.is_meta and bool(condition) is not self.outcome:
            return instead
        return self.body(*args)


class Checkpointed(Folded):
    """Ops that the model put under ``torch.utils.checkpoint``: computed again in the backward instead of kept."""

    def __init__(self, body: fx.GraphModule, preserve_rng_state: bool = True) -> None:
        super().__init__(body)
        self.preserve_rng_state = preserve_rng_state

    def forward(self, *args: Any) -> Any:
        """Run the ops under a checkpoint."""
        if not torch.is_grad_enabled():
            return self.body(*args)
        return checkpoint(self.body, *args, use_reentrant=False, preserve_rng_state=self.preserve_rng_state)
