"""Which devices a growing downset has used, and how much work each such state can hold below a limit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .reduction import Dag, Floats, Ints

_MOST_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class CutDevice:
    """A device that can hold one stage.

    Args:
        kind: the key of ``compute_s`` whose seconds a node takes here.
        memory_bytes: the limit on a stage's bytes; None for no limit.
        pays_transfers: False if transfers cost this device nothing (its neighbours still pay theirs).
    """

    name: str
    kind: str
    memory_bytes: float | None = None
    pays_transfers: bool = True


@dataclass(frozen=True)
class Step:
    """The next stage: it takes the pipeline from one state to another.

    It runs on ``replicas`` devices like those of class ``c``, each of which holds ``in_flight`` microbatches.
    """

    source: int
    target: int
    c: int
    in_flight: int
    replicas: int = 1


@dataclass(frozen=True)
class Slots:
    """The states of a pipeline that is filled stage by stage.

    ``classes`` are the sets of interchangeable devices, ``used[state, c]`` counts those of class ``c`` that have
    their stage, or will have none.  In a fixed order every device is a class, and a step takes those from ``c`` on.
    ``exact`` demands a working node in every stage.
    """

    devices: tuple[CutDevice, ...]
    classes: tuple[tuple[int, ...], ...]
    kind_of: tuple[int, ...]  # per class: the column of Dag.time_s
    used: Ints  # (states, classes)
    steps: tuple[Step, ...]
    starts: tuple[int, ...]
    finals: tuple[int, ...]
    exact: bool

    def device(self, c: int) -> CutDevice:
        """The first device of class ``c``."""
        return self.devices[self.classes[c][0]]

    @property
    def sizes(self) -> Ints:
        """The number of devices in each class."""
        return np.array([len(group) for group in self.classes], dtype=np.int64)

    @property
    def most_replicas(self) -> int:
        """The most devices that one stage can have."""
        return max(step.replicas for step in self.steps)

    @property
    def least_in_flight(self) -> int:
        """The fewest microbatches that a stage holds."""
        return min(step.in_flight for step in self.steps)

    def fewest_stages(self, ends: tuple[int, ...], *, onward: bool) -> Floats:
        """Per state, the fewest steps that lead there from one of ``ends``, or from there to one of them."""
        fewest = np.full(len(self.used), np.inf)
        fewest[list(ends)] = 0.0
        level = self.used.sum(axis=1)  # every step raises it
        for step in sorted(self.steps, key=lambda step: int(level[step.source]), reverse=not onward):
            known, new = (step.source, step.target) if onward else (step.target, step.source)
            fewest[new] = min(fewest[new], fewest[known] + 1)
        return fewest


@dataclass(frozen=True)
class Windows:
    """What can lie before and after a boundary between stages if every load stays below ``limit_s``.

    Column q of ``weights`` is an additive measure of nodes.  In a state, the nodes before the boundary weigh at most
    ``before[state, q]``, those after it at most ``after[state, q]``, where the transfers cut by the boundary (seconds)
    count on either side with the given factor, as each is paid at least once on either side.
    """

    limit_s: float
    weights: Floats  # (n, q)
    before: Floats  # (states, q)
    after: Floats
    before_cut: Floats
    after_cut: Floats
    most_replicas: int = 1

    @property
    def stage_s(self) -> float:
        """The work of a stage, over all its replicas, stays below this."""
        return self.limit_s * self.most_replicas

    def meet(self, inside: Floats, outside: Floats, cut_s: Floats) -> NDArray[np.bool_]:
        """Tell which states a boundary can have that puts at least these weights inside and outside it.

        Shapes: ``inside`` and ``outside`` (rows, q), ``cut_s`` (rows,), the answer (rows, states).
        """
        ok = np.ones((len(inside), len(self.before)), dtype=np.bool_)
        for part in self._parts(len(inside)):
            for q in range(self.weights.shape[1]):
                cut = cut_s[part, None]
                ok[part] &= inside[part, q, None] + cut * self.before_cut[:, q] <= self.before[:, q]
                ok[part] &= outside[part, q, None] + cut * self.after_cut[:, q] <= self.after[:, q]
        return ok

    def _parts(self, n_rows: int) -> list[slice]:
        """Cut the rows up: with thousands of states, all at once would take gigabytes."""
        step = max(1, _MOST_AT_ONCE // len(self.before))
        return [slice(at, at + step) for at in range(0, n_rows, step)]

    def admit(self, inside: Floats, outside: Floats, cut_s: Floats) -> NDArray[np.bool_]:
        """Tell whether any state has such a boundary."""  # (rows,)
        admitted = np.zeros(len(inside), dtype=np.bool_)
        for part in self._parts(len(inside)):
            admitted[part] = self.meet(inside[part], outside[part], cut_s[part]).any(axis=1)
        return admitted


def windows(dag: Dag, slots: Slots, limit_s: float) -> Windows:
    """Bound the weight on both sides of a boundary, for every state and every measure.

    Measures: seconds per kind, bytes if every device has a limit, working nodes if each stage needs one, pinned nodes.
    Replicas have the limits once each: the work of a stage on r of them is below r limits, its bytes are on each.
    Gradients to add up, forwards computed again, shared bytes and workspace only add to loads and bytes.
    """
    left = slots.sizes - slots.used
    columns: list[tuple[Floats, Floats, Floats, Floats, Floats]] = []
    for kind in range(dag.time_s.shape[1]):
        weight = np.where(dag.barred[:, kind] > 0, dag.least_s, dag.time_s[:, kind])
        capacity, factor = capacity_s(dag, slots, weight, limit_s)
        slack = 1e-12 * (float(weight.sum()) + limit_s)
        columns.append(
            (weight, _held(slots.used, capacity) + slack, _held(left, capacity) + slack,
             _least_factor(slots.used, factor), _least_factor(left, factor))
        )  # fmt: skip
    zero = np.zeros(len(slots.used))
    for weight, before, after in [*_memory(dag, slots), *_stage_counts(dag, slots), *_pins(dag, slots)]:
        columns.append((weight, before, after, zero, zero))
    weights, before, after, before_cut, after_cut = (np.stack(part, axis=1) for part in zip(*columns))
    return Windows(limit_s, weights, before, after, before_cut, after_cut, slots.most_replicas)


def capacity_s(dag: Dag, slots: Slots, weight: Floats, limit_s: float) -> tuple[Floats, Floats]:
    """Per class: the weight that fits below the limit, and the weight that a second of transfers displaces."""
    capacity = np.zeros(len(slots.classes))
    factor = np.zeros(len(slots.classes))
    for c, kind in enumerate(slots.kind_of):
        able = (dag.barred[:, kind] == 0) & (weight > 0)
        seconds = dag.time_s[able, kind]
        ratio = float((weight[able] / seconds).max(initial=0.0)) if (seconds > 0).all() else np.inf
        capacity[c] = ratio * limit_s
        factor[c] = min(1.0, ratio) if slots.device(c).pays_transfers else 0.0
    return capacity, factor


def _held(counts: Ints, capacity: Floats) -> Floats:
    return (counts * np.where(counts > 0, capacity, 0.0)).sum(axis=1)  # type: ignore[no-any-return]


def _least_factor(counts: Ints, factor: Floats) -> Floats:
    return np.where(counts > 0, factor, 1.0).min(axis=1)  # type: ignore[no-any-return]


def _memory(dag: Dag, slots: Slots) -> list[tuple[Floats, Floats, Floats]]:
    limit = np.array([np.inf if (m := slots.device(c).memory_bytes) is None else m for c in range(len(slots.classes))])
    weight = dag.static_bytes + least_held(dag, slots) * dag.stash_bytes
    if not np.isfinite(limit).any() or not weight.any():
        return []
    slack = 1e-9 * float(weight.sum())
    return [(weight, _held(slots.used, limit) + slack, _held(slots.sizes - slots.used, limit) + slack)]


def least_held(dag: Dag, slots: Slots) -> int:
    """How often a stage holds its stash, at least: once if it recomputes."""
    recompute = "never" if dag.burdens is None else dag.burdens.recompute
    if recompute == "never":
        return slots.least_in_flight
    return 1 if recompute == "always" else min(slots.least_in_flight, 1)


def _stage_counts(dag: Dag, slots: Slots) -> list[tuple[Floats, Floats, Floats]]:
    if not slots.exact:
        return []
    total = float(dag.working.sum())
    before = total - slots.fewest_stages(slots.finals, onward=False)
    return [(dag.working.astype(np.float64), before, total - slots.fewest_stages(slots.starts, onward=True))]


def _pins(dag: Dag, slots: Slots) -> list[tuple[Floats, Floats, Floats]]:
    columns = []
    pinned = frozenset[int]().union(*dag.pins)
    for c, group in enumerate(slots.classes):
        if group[0] not in pinned:
            continue
        weight = np.array([float(group[0] in pins) for pins in dag.pins])
        is_used = slots.used[:, c] > 0
        columns.append((weight, np.where(is_used, np.inf, 0.0), np.where(is_used, 0.0, np.inf)))
    return columns
