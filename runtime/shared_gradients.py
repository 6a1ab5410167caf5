"""Gradients in shared memory: backwards add them up where the parent reads them, and replicas sum them there.

A gradient moves to its slot of the arena right after the op that made it, while it is in the processor's cache, and the
backwards of later microbatches add to it in place. Replicas of a stage then sum their slots, each its own part of them.
DDP over gloo does the same by messages, which the last backward's cores have to carry: for 50 MB of gradients of two
replicas on two cores it made the step 70 ms longer, these sums 10 ms. Ranks under torchrun, which share no memory that
could be relied upon, keep DDP (replicate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch


def gradient_slot(worker: int, name: str) -> str:
    """Name the place in the arena for a worker's gradient of a parameter."""
    return f"gradient/{worker}/{name}"


class GradientSlots:
    """Where the gradients of one worker's parameters belong."""

    def __init__(self, parameters: dict[str, torch.Tensor], slots: dict[str, torch.Tensor]) -> None:
        """Take parameters and slots by name; slots are dense, with the strides of their parameters."""
        self._parameters = parameters
        self.slots = slots
        for name, slot in slots.items():
            if parameters[name].requires_grad:
                parameters[name].register_post_accumulate_grad_hook(partial(_move, slot))  # type: ignore[no-untyped-call]

    def written(self) -> tuple[str, ...]:
        """Name the parameters that have a gradient, and see to it that all of these lie in their slots."""
        found = tuple(name for name in self.slots if self._parameters[name].grad is not None)
        for name in found:
            _move(self.slots[name], self._parameters[name])
        return found

    def has(self, name: str) -> bool:
        """Say whether the parameter has a gradient."""
        return self._parameters[name].grad is not None

    def take(self, name: str) -> None:
        """Let the slot be the parameter's gradient, as others have written to it."""
        self._parameters[name].grad = self.slots[name]


def _move(slot: torch.Tensor, parameter: torch.Tensor) -> None:
    """Bring a gradient to its slot, if it is not there: autograd adds to the slot from then on."""
    gradient = parameter.grad
    if gradient is None:
        return
    dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
    if dense.data_ptr() == slot.data_ptr():
        return
    slot.copy_(dense)
    parameter.grad = slot


class SharedMemoryReducer:
    """Sum a stage's gradients over its replicas, into the slots of the first.

    Every microbatch's loss already carries its share of the batch, so the sums are the gradients of the unsplit model;
    a parameter that no replica used has none. Replicas are added in their order, so that sums are the same every time.
    """

    follows_autograd = False

    def __init__(
        self,
        own: GradientSlots,
        names: Sequence[str],
        owners: Sequence[dict[str, torch.Tensor]],
        replica: int,
        exchange: Callable[[torch.Tensor], object],
    ) -> None:
        """Take the names of the stage's parameters, and per replica the slots by name; this one is ``replica``.

        ``exchange`` waits for all replicas and turns a tensor into the element-wise maximum of all of theirs.
        """
        self._own = own
        self._names = list(names)
        self._replica = replica
        self._exchange = exchange
        self._n_replicas = len(owners)
        parts = _parts([owners[0][name].numel() for name in names], replica, len(owners))
        self._views = {
            names[index]: [_flat(slots[names[index]])[start:end] for slots in owners] for index, start, end in parts
        }

    def arm(self, roots: list[torch.Tensor]) -> None:
        """Nothing to announce: the sums begin when all replicas are through with their backwards."""

    def complete(self) -> None:
        """Wait for the other replicas and sum this one's part of all gradients."""
        if not self._names:
            return  # ops without parameters: nothing to sum, and none of the replicas waits for the others
        self._own.written()
        has = torch.zeros(self._n_replicas, len(self._names), dtype=torch.uint8)
        has[self._replica] = torch.tensor([self._own.has(name) for name in self._names], dtype=torch.uint8)
        self._exchange(has)
        writers = dict(zip(self._names, has.T.tolist()))
        every = [views for name, views in self._views.items() if all(writers[name])]
        for replica in range(1, self._n_replicas if every else 0):
            torch._foreach_add_([views[0] for views in every], [views[replica] for views in every])
        for name, views in self._views.items():
            if not all(writers[name]):
                _sum_some([view for view, wrote in zip(views, writers[name]) if wrote], views[0])
        if self._replica == 0:
            for name in self._names:
                if any(writers[name]):
                    self._own.take(name)


class CommonReducer:
    """Completes a reduction once all stages of a worker that add to its parameters are through."""

    def __init__(self, reducer: SharedMemoryReducer, n_stages: int) -> None:
        self._reducer, self._n_stages = reducer, n_stages
        self._n_through = 0

    def stage_is_through(self) -> None:
        """Note that one more of the stages has added all that it will in this step."""
        self._n_through += 1
        if self._n_through == self._n_stages:
            self._n_through = 0
            self._reducer.complete()


class WithCommon:
    """The reduction of a stage that shares some of its parameters with other stages of its worker."""

    follows_autograd = False

    def __init__(self, own: SharedMemoryReducer, common: Sequence[CommonReducer]) -> None:
        self._own, self._common = own, common

    def arm(self, roots: list[torch.Tensor]) -> None:
        """Nothing to announce."""

    def complete(self) -> None:
        """Sum what is this stage's alone, and what it was the last to add to."""
        self._own.complete()
        for reducer in self._common:
            reducer.stage_is_through()


def _sum_some(written: list[torch.Tensor], target: torch.Tensor) -> None:
    """Sum what some of the replicas have written."""
    if not written:
        return
    first, *others = written
    if first.data_ptr() != target.data_ptr():
        target.copy_(first)
    for other in others:
        target.add_(other)


def _flat(slot: torch.Tensor) -> torch.Tensor:
    """View a dense tensor as one row of numbers, in the order of its memory."""
    return slot.as_strided((slot.numel(),), (1,))


def _parts(sizes: Sequence[int], replica: int, n_replicas: int) -> list[tuple[int, int, int]]:
    """Return which elements of which tensor a replica sums, as (index, start, end): equal shares of them all.

    >>> _parts([4, 1, 3], 0, 2), _parts([4, 1, 3], 1, 2)
    ([(0, 0, 4)], [(1, 0, 1), (2, 0, 3)])
    """
    total = sum(sizes)
    low, high = total * replica // n_replicas, total * (replica + 1) // n_replicas
    found, before = [], 0
    for index, size in enumerate(sizes):
        start, end = max(low - before, 0), min(high - before, size)
        if start < end:
            found.append((index, start, end))
        before += size
    return found
