"""Made-up values: what a function that needs data gives, if only the shapes of its results matter.

Opaque modules and ops whose shapes depend on data do not run on tensors without data. They are run twice on numbers
that mean nothing; where the two results differ in shape, the shape depends on data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from ...runtime.program.calls import form_of
from ...structure import flatten, unflatten
from .state import own_random_state, put_back

_SEEDS = (0, 1)


def run(function: Callable[..., Any], args: Any, kwargs: Any, module: nn.Module | None, mode: FakeTensorMode) -> Any:
    """Run ``function`` on made-up tensors like those in the arguments; returns its result on tensors without data, and
    the tensors in it whose shape depends on data. ``module`` is what it may change, and gets back.

    Raises:
        Exception: what the function raises on such values.
    """
    results = []
    for seed in _SEEDS:
        with _on_data(), _kept(module):
            torch.manual_seed(seed)
            given_args, given_kwargs = _real((args, kwargs))
            results.append(flatten(function(*given_args, **given_kwargs)))
    (leaves, structure), (others, other_structure) = results
    if structure != other_structure:
        raise ValueError("its result has another structure for other data")
    with mode:
        made = [_without_data(leaf) for leaf in leaves]
    unsure = [a for a, b, c in zip(made, leaves, others) if isinstance(b, torch.Tensor) and b.shape != c.shape]
    return unflatten(structure, made), unsure


def forms(function: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    """Return the forms that results of ``function`` have for numbers that mean nothing, and masks of every kind.

    Values for which it does not run are left out.
    """
    found = []
    for masked in (None, True, False):
        with _on_data(), suppress(Exception):
            torch.manual_seed(0)
            given_args, given_kwargs = _real((args, kwargs), torch.Tensor, masked)
            found.append(form_of(function(*given_args, **given_kwargs)))
    return found


@contextmanager
def _on_data() -> Iterator[None]:
    """Run on data, from random numbers of its own, and no compiled code, which leaves checks of indices out."""
    with unset_fake_temporarily(), own_random_state(), torch.compiler.set_stance("force_eager"):
        yield


def _real(value: Any, kind: type[torch.Tensor] = FakeTensor, masked: bool | None = None) -> Any:
    leaves, structure = flatten(value)
    known: dict[int, torch.Tensor] = {}
    return unflatten(structure, [_made_up(x, known, masked) if isinstance(x, kind) else x for x in leaves])


def _made_up(like: torch.Tensor, known: dict[int, torch.Tensor], masked: bool | None) -> torch.Tensor:
    """Make normal numbers, zeros where integers may be indices, and for masks ``masked`` or either truth value."""
    if id(like) not in known:
        made = torch.empty_strided(tuple(like.shape), like.stride(), dtype=like.dtype, device=like.device)
        if like.is_floating_point() or like.is_complex():
            made.normal_()
        else:
            made.zero_()
            if like.dtype is torch.bool:
                made.copy_(torch.rand(tuple(like.shape)) < 0.5 if masked is None else torch.tensor(masked))
        made.requires_grad_(like.requires_grad)
        known[id(like)] = made.clone() if like.requires_grad and not like.is_leaf else made
    return known[id(like)]


def _without_data(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    made = torch.empty_strided(tuple(leaf.shape), leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    return made.requires_grad_().clone() if leaf.requires_grad else made


@contextmanager
def _kept(module: nn.Module | None) -> Iterator[None]:
    if module is None:
        yield
        return
    state = [*module.parameters(), *module.buffers()]
    before = [tensor.detach().clone() for tensor in state]
    try:
        with put_back(module, caches=()):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, before):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
