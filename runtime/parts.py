"""What a stage's joint graph is cut into: plain data, so that only who records has to import what records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Part = Callable[..., list[Any]]
FILE = "<stagecut part"  # what the names of the parts' files begin with
OP = "# op "  # in a line of a part, before the name of the stage's op that it comes from


class Untraceable(Exception):
    """A function that no joint graph can stand for; the message says why."""


@dataclass(frozen=True)
class Parts:
    """The parts of a joint graph, as functions of lists of tensors, which they empty, to lists of tensors.

    Attributes:
        forward: from the inputs to ``n_results`` results, followed by what the backward needs.
        backward_input: from what the backward needs, followed by the tangents, to the gradients of ``input_gradients``,
            followed by what the weight gradients need.
        backward_weight: gives the gradients of ``weight_gradients`` to a sink, which it takes besides.
        backward: from what the backward needs, followed by the tangents, to the gradients of ``input_gradients``, and
            the others to a sink, which it takes besides.
        input_gradients, weight_gradients: inputs of the forward, by number.
        depends: per input that wants a gradient, the tangents that it depends on, by number.
    """

    forward: Part
    backward_input: Part
    backward_weight: Part
    backward: Part
    n_results: int
    input_gradients: tuple[int, ...]
    weight_gradients: tuple[int, ...]
    depends: dict[int, frozenset[int]]


@contextlib.contextmanager
def without_autocast(autocast: tuple[str, torch.dtype] | None) -> Iterator[None]:
    """Leave the autocast region: its casts were recorded."""
    if autocast is None:
        yield
    else:
        with torch.autocast(autocast[0], enabled=False):
            yield
