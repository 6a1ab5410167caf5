"""A stage's backward in two parts: explicit graphs where its ops can be recorded, autograd as a whole where not.

Input gradients that run apart from weight gradients let the stage before go on sooner (Qi et al., ICLR 2024,
https://arxiv.org/abs/2401.10241). Running autograd twice, or cutting its graph, costs 1.04 to 2.7 times one backward;
graphs that were cut beforehand (joint/) do the work of one. Here it is decided what is recorded, and when; recorded.py
does it, apart.py runs what was recorded.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ..heap import give_freed_memory_back
from ..structure import flatten
from .apart import Apart, backward, backward_weight, run_forward
from .parts import Untraceable
from .program.recordable import has_module_hooks
from .recorded import Recorded, record, state_of
from .seeding import Seed
from .sinks import Accumulate, Arm, Sink, ThroughAutograd, finish, has_hooks

STEPS_BEFORE = 2  # that a signature comes up in, before it is recorded for steps that do not split backwards
_MOST_RECORDED = 16
_MOST_SEEN = 1024
_MOST_OPS = 1000  # of a stage that is recorded though its backward is not split: of thousands it takes seconds


class Explicit:
    """The explicit parts of one stage, recorded once per signature of its arguments.

    A step that computes input and weight gradients apart records what it meets at once. One that does not records what
    has come up in a few steps: explicit graphs do the same work as autograd, with less to do per op, and put weight
    gradients where they belong without a copy; but recording takes as long as some steps.

    With ``fuses``, weight gradients are added by the product that makes them, which rounds as no autograd does. With
    ``onednn``, large products are oneDNN's, which rounds otherwise than the BLAS that autograd calls.

    Attributes:
        slots: by id of a parameter, where its gradient belongs.
        why_not: why the latest forward was not recorded, if it was to be.
    """

    def __init__(self, seed: Seed, fuses: bool = False, onednn: bool = False) -> None:
        self.seed, self._fuses, self._onednn = seed, fuses, onednn
        self.slots: dict[int, torch.Tensor] = {}
        self.why_not: str | None = None
        self._known: dict[Any, Recorded | str] = {}  # or why there is none
        self._seen: dict[Any, list[int]] = {}
        self._n_steps = self._n_ops = 0
        self._wanted = False
        self._at_once = False
        self._has_hooks = False
        self._weights: list[torch.Tensor] = []
        self._places: list[torch.Tensor | None] = []
        self._settings: tuple[Any, ...] = ()
        self._state: Any = None

    def look_at(self, module: fx.GraphModule) -> None:
        """Note what of the stage's modules may have changed."""
        self._weights = list(state_of(module).values())
        self._places = [self.slots.get(id(weight)) for weight in self._weights]
        layouts = ((tuple(w.shape), w.stride(), w.dtype) for w in self._weights)
        self._settings = (*map(_settings_of, module.modules()), *layouts)
        self._n_ops = len(module.graph.nodes)

    def begin(self, splits: bool, steady: bool) -> None:
        """Prepare for a step: one that ``splits`` backwards, or one like many others to come (``steady``)."""
        self._n_steps += 1
        self._at_once, self._wanted, self.why_not = splits, splits or steady, None
        if self._wanted:
            self._has_hooks = not self.slots and has_hooks(self._weights)
            self._state = (self._settings, tuple(weight.requires_grad for weight in self._weights))

    def forward(self, module: fx.GraphModule, values: Sequence[Any]) -> tuple[dict[str, Any], Apart] | None:
        """Compute the results of ``module``, and what its backward needs; None where autograd is to do it."""
        if not self._wanted or not torch.is_grad_enabled():
            return None
        try:
            recorded = self._parts_for(module, values)
        except Untraceable as reason:
            self.why_not = str(reason) if self._at_once else None
            return None
        return None if recorded is None else run_forward(recorded, self._weights, values)

    def backward(
        self, apart: Apart, roots: list[torch.Tensor], gradients: list[torch.Tensor | None], arm: Arm | None
    ) -> None:
        """Do what both parts do, at once."""
        sink = self._sink(arm)
        backward(apart, roots, gradients, sink)
        finish(sink, arm)

    def backward_weight(self, apart: Apart, arm: Arm | None) -> None:
        """Give the weights what :func:`backward_input` left."""
        sink = self._sink(arm)
        backward_weight(apart, sink)
        finish(sink, arm)

    def _sink(self, arm: Arm | None) -> Sink:
        if arm is not None or self._has_hooks:
            return ThroughAutograd(self._weights)
        return Accumulate(self._weights, self._places, self._fuses)

    def _parts_for(self, module: fx.GraphModule, values: Sequence[Any]) -> Recorded | None:
        """Return the parts of ``module`` for arguments like ``values`` and the autocast region that is open.

        Raises:
            Untraceable: the module cannot be recorded; asked again, the same.
        """
        leaves, structure = flatten(list(values))
        autocast = _autocast_of(leaves)
        key = (id(module), self._state, autocast, repr(structure), tuple(map(_signature, leaves)))
        found = self._known.get(key)
        if found is None:
            if not self._at_once and not self._is_worth_it(key):
                return None
            try:
                found = record(module, leaves, structure, autocast, self.seed, self._fuses, self._onednn)
                gc.collect()  # graphs are cycles
                give_freed_memory_back()  # what autograd left holes between is cut otherwise from now on
            except Untraceable as error:
                found = str(error)
            while len(self._known) >= _MOST_RECORDED:
                del self._known[next(iter(self._known))]
            self._known[key] = found
        if isinstance(found, str):
            raise Untraceable(found)
        return found

    def _is_worth_it(self, key: Any) -> bool:
        """Say whether a signature has come up in some steps, and is not one of many."""
        if (
            self._n_ops > _MOST_OPS
            or len(self._known) >= _MOST_RECORDED
            or (key not in self._seen and len(self._seen) >= _MOST_SEEN)
        ):
            return False
        count = self._seen.setdefault(key, [0, 0])
        if count[1] != self._n_steps:
            count[:] = [count[0] + 1, self._n_steps]
        return count[0] > STEPS_BEFORE


def _settings_of(module: nn.Module) -> tuple[Any, ...]:
    """Return what a recording takes for granted of a module: its mode, its plain attributes, whether it has hooks."""
    plain = (repr(value) if isinstance(value, tuple) else value for value in vars(module).values())
    own = tuple(value for value in plain if value is None or isinstance(value, (bool, int, float, str)))
    return (*own, has_module_hooks(module))


def _autocast_of(leaves: Sequence[Any]) -> tuple[str, torch.dtype] | None:
    """Return device type and dtype of the autocast region that is open on the device of the first tensor."""
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)), "cpu")
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)
    return (type(leaf), repr(leaf))
