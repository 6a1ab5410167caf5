"""Which devices a growing downset has used, and how much work each such state can hold below a limit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ConstraintError
from .reduction import Dag, Floats, Ints

MAX_STATES = 4096


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
    """The next stage: it runs on a device of class ``c`` and takes the pipeline from one state to another."""

    source: int
    target: int
    c: int
    in_flight: int


@dataclass(frozen=True)
class Slots:
    """The states of a pipeline that is filled stage by stage.

    ``classes`` are the sets of interchangeable devices, ``used[state, c]`` counts those of class ``c`` that have
    their stage.  ``exact`` demands a working node in every stage and a stage on every device.
    """

    devices: tuple[CutDevice, ...]
    classes: tuple[tuple[int, ...], ...]
    kind_of: tuple[int, ...]  # per class: the column of Dag.time_s
    used: Ints  # (states, classes)
    steps: tuple[Step, ...]
    finals: tuple[int, ...]
    in_flight: tuple[int, ...]  # per stage position
    exact: bool

    def device(self, c: int) -> CutDevice:
        """The first device of class ``c``."""
        return self.devices[self.classes[c][0]]

    @property
    def sizes(self) -> Ints:
        """The number of devices in each class."""
        return np.array([len(group) for group in self.classes], dtype=np.int64)


def fixed_order(devices: Sequence[CutDevice], kinds: Sequence[str], in_flight: Sequence[int]) -> Slots:
    """Stage ``s`` runs on ``devices[s]``, and no device stays unused."""
    k = len(devices)
    return Slots(
        devices=tuple(devices),
        classes=tuple((d,) for d in range(k)),
        kind_of=tuple(kinds.index(device.kind) for device in devices),
        used=np.tri(k + 1, k, -1, dtype=np.int64),
        steps=tuple(Step(s, s + 1, s, in_flight[s]) for s in range(k)),
        finals=(k,),
        in_flight=tuple(in_flight),
        exact=True,
    )


def any_order(
    devices: Sequence[CutDevice], kinds: Sequence[str], in_flight: Sequence[int], pinned: frozenset[int]
) -> Slots:
    """Any order, any subset of the devices; equal devices that nothing is pinned to share a class."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for d, device in enumerate(devices):
        key = (device.kind, device.memory_bytes, device.pays_transfers, d if d in pinned else -1)
        groups.setdefault(key, []).append(d)
    classes = tuple(map(tuple, groups.values()))
    n_states = int(np.prod([len(group) + 1 for group in classes]))
    if n_states > MAX_STATES:
        raise ConstraintError(
            f"{len(devices)} devices of {len(classes)} different sorts can be used in {n_states} ways, "
            f"more than the {MAX_STATES} that the search over their order is meant for",
            hint="give the devices in pipeline order and pass ordered=True",
        )
    used = np.array(list(itertools.product(*(range(len(group) + 1) for group in classes))), dtype=np.int64)
    index = {tuple(row): state for state, row in enumerate(used.tolist())}
    steps = []
    for row, state in index.items():
        for c, group in enumerate(classes):
            if row[c] < len(group):
                target = index[(*row[:c], row[c] + 1, *row[c + 1 :])]
                steps.append(Step(state, target, c, in_flight[sum(row)]))
    kind_of = tuple(kinds.index(devices[group[0]].kind) for group in classes)
    finals = tuple(range(len(used)))
    return Slots(tuple(devices), classes, kind_of, used, tuple(steps), finals, tuple(in_flight), exact=False)


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

    def meet(self, inside: Floats, outside: Floats, cut_s: Floats) -> NDArray[np.bool_]:
        """Tell which states a boundary can have that puts at least these weights inside and outside it.

        Shapes: ``inside`` and ``outside`` (rows, q), ``cut_s`` (rows,), the answer (rows, states).
        """
        ok = np.ones((len(inside), len(self.before)), dtype=np.bool_)
        for q in range(self.weights.shape[1]):
            ok &= inside[:, q, None] + cut_s[:, None] * self.before_cut[:, q] <= self.before[:, q]
            ok &= outside[:, q, None] + cut_s[:, None] * self.after_cut[:, q] <= self.after[:, q]
        return ok

    def admit(self, inside: Floats, outside: Floats, cut_s: Floats) -> NDArray[np.bool_]:
        """Tell whether any state has such a boundary."""  # (rows,)
        admitted: NDArray[np.bool_] = np.any(self.meet(inside, outside, cut_s), axis=1)
        return admitted


def windows(dag: Dag, slots: Slots, limit_s: float) -> Windows:
    """Bound the weight on both sides of a boundary, for every state and every measure.

    Measures: seconds per kind, bytes if every device has a limit, working nodes if each stage needs one, pinned nodes.
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
    return Windows(limit_s, weights, before, after, before_cut, after_cut)


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
    weight = dag.static_bytes + min(slots.in_flight) * dag.stash_bytes
    if not np.isfinite(limit).any() or not weight.any():
        return []
    slack = 1e-9 * float(weight.sum())
    return [(weight, _held(slots.used, limit) + slack, _held(slots.sizes - slots.used, limit) + slack)]


def _stage_counts(dag: Dag, slots: Slots) -> list[tuple[Floats, Floats, Floats]]:
    if not slots.exact:
        return []
    done = slots.used.sum(axis=1).astype(np.float64)
    total = float(dag.working.sum())
    return [(dag.working.astype(np.float64), total - (len(slots.devices) - done), total - done)]


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
