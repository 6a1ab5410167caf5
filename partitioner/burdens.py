"""What a stage costs beside the seconds and bytes of its nodes that simply add up."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Recompute = Literal["never", "choose", "always"]
Net = tuple[int, tuple[int, ...]]  # a producer and its consumers
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class AllReduce:
    """The price of adding up the gradients of ``r`` replicas on a ring, shared by ``per`` microbatches."""

    bytes_per_s: float
    latency_s: float = 0.0
    overlapped: bool = False
    per: float = 1.0

    def seconds(self, gradient_bytes: Floats | float, replicas: Ints | int) -> Floats:
        """Seconds per microbatch: (2 (r - 1) / r x bytes / bytes_per_s + latency_s) / per; 0 for one replica."""
        r = np.asarray(replicas)
        ring = 2 * (r - 1) / r * gradient_bytes / self.bytes_per_s + self.latency_s
        return np.where(r == 1, 0.0, ring / self.per)

    def join(self, busy_s: Floats, reduce_s: Floats) -> Floats:
        """The load of a stage that computes and reduces."""
        return np.maximum(busy_s, reduce_s) if self.overlapped else busy_s + reduce_s


@dataclass(frozen=True)
class Burdens:
    """Costs per node (one that cannot matter is 0), bytes that several nodes share, and what they are used for.

    A stage with a node of ``groups[g]`` holds ``group_bytes[g]`` once.  A stage without the producer, but with a
    consumer, of ``inputs[t]`` keeps ``input_bytes[t]`` per microbatch in flight if it recomputes.
    """

    forward_s: Floats  # (n, kinds): paid once more by a stage that chooses to recompute
    gradient_bytes: Floats  # (n,)
    workspace_bytes: Floats  # (n,): a stage needs the largest of them once
    groups: tuple[tuple[int, ...], ...]
    group_bytes: Floats  # (groups, 3): static, stash, gradient
    inputs: tuple[Net, ...]
    input_bytes: Floats  # (inputs,)
    recompute: Recompute
    all_reduce: AllReduce | None

    def contract(self, group: Ints, n: int) -> Burdens:
        """Merge the nodes with the same group number below ``n``."""
        forward_s = np.zeros((n, self.forward_s.shape[1]))
        gradient, workspace = np.zeros(n), np.zeros(n)
        np.add.at(forward_s, group, self.forward_s)
        np.add.at(gradient, group, self.gradient_bytes)
        np.maximum.at(workspace, group, self.workspace_bytes)
        number = group.tolist()
        inputs = [(number[p], {number[v] for v in users} - {number[p]}) for p, users in self.inputs]
        groups, group_bytes = _add_up(
            (tuple(sorted({number[v] for v in nodes})) for nodes in self.groups), self.group_bytes
        )
        kept = [t for t, (_, users) in enumerate(inputs) if users]
        nets, input_bytes = _add_up(((inputs[t][0], tuple(sorted(inputs[t][1]))) for t in kept), self.input_bytes[kept])
        return replace(
            self,
            forward_s=forward_s,
            gradient_bytes=gradient,
            workspace_bytes=workspace,
            groups=groups,
            group_bytes=group_bytes,
            inputs=nets,
            input_bytes=input_bytes,
        )

    def without_memory(self) -> Burdens | None:
        """Forget what matters only under a memory limit; None if nothing is left."""
        rest = replace(
            self,
            forward_s=self.forward_s * 0,
            workspace_bytes=self.workspace_bytes * 0,
            group_bytes=self.group_bytes * [0.0, 0.0, 1.0],
            inputs=(),
            input_bytes=np.zeros(0),
            recompute="never",
        )
        return None if rest.all_reduce is None else rest

    def most_s(self) -> float:
        """Seconds that no stage pays more of than this."""
        gradient_bytes = float(self.gradient_bytes.sum() + self.group_bytes[:, 2].sum())
        reduce_s = 0.0
        if self.all_reduce is not None:
            reduce_s = (
                2 * gradient_bytes / self.all_reduce.bytes_per_s + self.all_reduce.latency_s
            ) / self.all_reduce.per
        return float(self.forward_s.max(axis=1).sum()) + reduce_s

    def weighs(self, v: int) -> bool:
        """Tell whether a stage costs more with node ``v``, the inputs that it keeps apart."""
        own = self.forward_s[v].any() or self.gradient_bytes[v] > 0 or self.workspace_bytes[v] > 0
        return bool(own) or v in self._sharing

    @cached_property
    def _sharing(self) -> frozenset[int]:
        return frozenset(v for nodes, size in zip(self.groups, self.group_bytes) if size.any() for v in nodes)

    @cached_property
    def _inputs_of(self) -> dict[int, list[int]]:
        """Per node, the inputs that it produces or consumes."""
        found: dict[int, list[int]] = {}
        for t, (producer, users) in enumerate(self.inputs):
            for v in (producer, *users):
                found.setdefault(v, []).append(t)
        return found

    def keeps_inputs(self, v: int, x: int) -> bool:
        """Tell whether no stage keeps more input bytes if node ``v`` moves to the stage of node ``x``.

        The stage that ``v`` leaves may now receive what ``v`` produces, and need no more what only ``v`` took from
        ``x``; the stage of ``x`` may now receive what ``v`` takes, and has what ``v`` gives to ``x`` at home.
        """
        leave = join = 0.0
        for t in self._inputs_of.get(v, ()):
            (producer, users), size = self.inputs[t], float(self.input_bytes[t])
            if producer == v:
                leave += size * (users != (x,))
                join -= size * (x in users)
            else:
                leave -= size * (producer == x and users == (v,))
                join += size * (x != producer and x not in users)
        return leave <= 0 and join <= 0


def _add_up(keys: Iterable[Key], values: Floats) -> tuple[tuple[Key, ...], Floats]:
    """Sum the values (rows, ...) of equal keys."""
    number: dict[Key, int] = {}
    rows = [number.setdefault(key, len(number)) for key in keys]
    total = np.zeros((len(number), *values.shape[1:]))
    np.add.at(total, np.array(rows, dtype=np.int64), values)
    return tuple(number), total
