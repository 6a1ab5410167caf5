"""What the nasty models are made of: an entry, the registry that collects entries, and common inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WIDTH = 6
STEPS = 5
VOCABULARY = 11


def no_kwargs(rows: int) -> dict[str, Any]:
    """Give no keyword arguments."""
    return {}


def nothing() -> None:
    """Reset nothing: the model keeps its state to itself."""


@dataclass(frozen=True)
class Nasty:
    """A small model that is correct in eager training and hard to capture.

    Attributes:
        build: makes the model; deterministic under ``torch.manual_seed``.
        args: positional example inputs for a number of rows, fresh from torch's current seed.
        kwargs: keyword example inputs, likewise.
        other_rows: the model takes batches of other sizes, before and after one of the example's size.
        modes: the model works after ``model.eval()``.
        deterministic: equal seeds (torch, random, numpy) and equal state give equal results.
        copies: ``copy.deepcopy`` of the model works.
        reset: brings state that is outside of the model (a global, a class attribute) back to its beginning.
    """

    build: Callable[[], nn.Module]
    args: Callable[[int], tuple[Any, ...]]
    kwargs: Callable[[int], dict[str, Any]] = no_kwargs
    other_rows: bool = True
    modes: bool = True
    deterministic: bool = True
    copies: bool = True
    reset: Callable[[], None] = nothing

    def model(self) -> nn.Module:
        """Build the model under a fixed seed, in training mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().train()


def features(rows: int) -> tuple[torch.Tensor]:
    """Give (rows, WIDTH)."""
    return (torch.randn(rows, WIDTH),)


def sequences(rows: int) -> tuple[torch.Tensor]:
    """Give (rows, STEPS, WIDTH)."""
    return (torch.randn(rows, STEPS, WIDTH),)


def images(rows: int) -> tuple[torch.Tensor]:
    """Give (rows, 3, 8, 8)."""
    return (torch.randn(rows, 3, 8, 8),)


def tokens(rows: int) -> tuple[torch.Tensor]:
    """Give (rows, STEPS) of whole numbers."""
    return (torch.randint(0, VOCABULARY, (rows, STEPS)),)


def two(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give two of (rows, WIDTH)."""
    return torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)


class Small(nn.Module):
    """Two layers, with the nasty thing in between: there is something to cut before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 3)


class Registry:
    """Collect the entries of one kind; an entry is called ``kind.name``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.entries: dict[str, Nasty] = {}

    def add(self, name: str, build: Callable[[], nn.Module], args: Any = features, **how: Any) -> None:
        """Add what ``build`` makes."""
        key = f"{self.kind}.{name}"
        assert key not in self.entries, key
        self.entries[key] = Nasty(build, args, **how)

    def model(self, args: Callable[[int], tuple[Any, ...]] = features, **how: Any) -> Any:
        """Add the decorated class."""

        def decorate(cls: type[nn.Module]) -> type[nn.Module]:
            self.add(cls.__name__, cls, args, **how)
            return cls

        return decorate

    def forward(
        self,
        args: Callable[[int], tuple[Any, ...]] = features,
        *,
        parts: dict[str, Callable[[], Any]] | None = None,
        buffers: dict[str, Callable[[], Any]] | None = None,
        **how: Any,
    ) -> Any:
        """Add a :class:`Small` model with the decorated function as forward and ``parts`` as further attributes."""

        def decorate(function: Callable[..., Any]) -> type[nn.Module]:
            def __init__(self: Small) -> None:
                Small.__init__(self)
                for name, make in (parts or {}).items():
                    setattr(self, name, make())
                for name, make in (buffers or {}).items():
                    self.register_buffer(name, make())

            names = {"__init__": __init__, "forward": function, "__doc__": function.__doc__}
            names |= {"__module__": function.__module__, "__qualname__": function.__qualname__}
            cls = type(function.__name__, (Small,), names)
            self.add(function.__name__, cls, args, **how)
            return cls

        return decorate
