"""The states and steps in which devices can be given to stages, one stage at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConstraintError
from .slots import CutDevice, Slots, Step

MAX_STATES = 4096

Counts = tuple[int, ...]  # per class: devices taken
State = tuple[Counts, int]  # and stages, where these have to be counted
Move = tuple[int, int, Counts]  # class, replicas, the counts after it


@dataclass(frozen=True)
class OneForwardOneBackward:
    """What a stage on r devices, with d from it to the end, holds: min(ceil(n / r), ceil(d / r)) microbatches.

    From Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training" (SOSP 2019).
    """

    n_microbatches: int

    def held(self, replicas: int, n_to_end: int) -> int:
        """The microbatches in flight."""
        return -(-min(self.n_microbatches, n_to_end) // replicas)


InFlight = Sequence[int] | OneForwardOneBackward


@dataclass(frozen=True)
class Grouping:
    """How many devices a stage may have, how many stages there are (None: any number), and which devices are alike.

    ``pinned`` devices stay alone; ``sorts`` tells apart devices whose difference was found not to matter for one
    stage each.
    """

    max_replicas: int = 1
    n_stages: int | None = None
    pinned: frozenset[int] = frozenset()
    sorts: tuple[int, ...] | None = None

    def sort(self, d: int, device: CutDevice) -> tuple[object, ...]:
        """Equal for interchangeable devices."""
        given = self.sorts[d] if self.sorts is not None and self.max_replicas > 1 else 0
        return device.kind, device.memory_bytes, device.pays_transfers, given, d if d in self.pinned else -1


def fixed_order(
    devices: Sequence[CutDevice], kinds: Sequence[str], in_flight: InFlight, grouping: Grouping | None = None
) -> Slots:
    """Each stage runs on the next devices, which are alike, and no device stays unused."""
    k = len(devices)
    how = grouping or Grouping()
    sorts = [how.sort(d, device) for d, device in enumerate(devices)]

    def moves(taken: Counts) -> Iterator[Move]:
        u = sum(taken)
        for r in range(1, min(how.max_replicas, k - u) + 1):
            if len(set(sorts[u : u + r])) > 1:
                return
            yield u, r, (1,) * (u + r) + (0,) * (k - u - r)

    classes = tuple((d,) for d in range(k))
    return _fill(devices, classes, kinds, moves, in_flight, how.n_stages, ordered=True)


def any_order(
    devices: Sequence[CutDevice], kinds: Sequence[str], in_flight: InFlight, grouping: Grouping | None = None
) -> Slots:
    """Any order, any subset of the devices; equal devices that nothing is pinned to share a class."""
    how = grouping or Grouping()
    groups: dict[tuple[object, ...], list[int]] = {}
    for d, device in enumerate(devices):
        groups.setdefault(how.sort(d, device), []).append(d)
    classes = tuple(map(tuple, groups.values()))

    def moves(taken: Counts) -> Iterator[Move]:
        for c, group in enumerate(classes):
            for r in range(1, min(how.max_replicas, len(group) - taken[c]) + 1):
                yield c, r, (*taken[:c], taken[c] + r, *taken[c + 1 :])

    return _fill(devices, classes, kinds, moves, in_flight, how.n_stages, ordered=False)


def _fill(
    devices: Sequence[CutDevice],
    classes: tuple[tuple[int, ...], ...],
    kinds: Sequence[str],
    moves: Callable[[Counts], Iterator[Move]],
    in_flight: InFlight,
    n_stages: int | None,
    *,
    ordered: bool,
) -> Slots:
    """List the states that lie between nothing taken and a complete pipeline.

    Where the microbatches in flight depend on the devices to the end, and the order is free, counts are taken from
    the end: a state then tells which devices are still to come, and a pipeline may start in any.
    """
    k = len(devices)
    counts_stages = n_stages is not None or (not isinstance(in_flight, OneForwardOneBackward) and len({*in_flight}) > 1)
    from_end = not ordered and isinstance(in_flight, OneForwardOneBackward)
    states, arcs = _grow(len(classes), moves, counts_stages, k if n_stages is None else n_stages)
    complete = [
        state for state in states if (not ordered or sum(state[0]) == k) and (n_stages is None or state[1] == n_stages)
    ]
    if not complete:
        raise ConstraintError(
            f"no grouping of the {k} devices in their order into stages on devices that are alike "
            + ("uses all of them" if n_stages is None else f"uses all of them for {n_stages} stages"),
            hint="change n_stages or max_replicas, or pass ordered=False",
        )
    index = {state: i for i, state in enumerate(_leading(states, arcs, set(complete)))}
    steps = []
    for a, (c, r, b) in arcs:
        if a in index and b in index:
            if isinstance(in_flight, OneForwardOneBackward):
                held = in_flight.held(r, sum(b[0]) if from_end else k - sum(a[0]))
            else:
                held = in_flight[a[1]]
            ends = (index[b], index[a]) if from_end else (index[a], index[b])
            steps.append(Step(*ends, c, held, r))
    used = np.array([counts for counts, _ in index], dtype=np.int64)
    nothing, done = (index[states[0]],), tuple(index[state] for state in complete)
    return Slots(
        devices=tuple(devices),
        classes=classes,
        kind_of=tuple(kinds.index(devices[group[0]].kind) for group in classes),
        used=np.array([len(group) for group in classes]) - used if from_end else used,
        steps=tuple(steps),
        starts=done if from_end else nothing,
        finals=nothing if from_end else done,
        exact=ordered or n_stages is not None,
    )


def _grow(
    n_classes: int, moves: Callable[[Counts], Iterator[Move]], counts_stages: bool, most_stages: int
) -> tuple[list[State], list[tuple[State, tuple[int, int, State]]]]:
    """The states that moves lead to, and the moves."""
    states: dict[State, None] = {((0,) * n_classes, 0): None}
    queue = list(states)
    arcs = []
    for state in queue:
        if counts_stages and state[1] == most_stages:
            continue
        for c, r, counts in moves(state[0]):
            target = (counts, state[1] + counts_stages)
            arcs.append((state, (c, r, target)))
            if target not in states:
                states[target] = None
                queue.append(target)
        if len(states) > MAX_STATES:
            raise ConstraintError(
                f"the devices, of {n_classes} different sorts, can be used in more than the {MAX_STATES} ways that the "
                "search over their order is meant for",
                hint="give the devices in pipeline order and pass ordered=True, or drop n_stages or unequal in_flight",
            )
    return queue, arcs


def _leading(
    states: Sequence[State], arcs: Sequence[tuple[State, tuple[int, int, State]]], complete: set[State]
) -> list[State]:
    """The states from which a complete one is reached, in the order given."""
    leading = set(complete)
    for a, (_, _, b) in sorted(arcs, key=lambda arc: -sum(arc[0][0])):
        if b in leading:
            leading.add(a)
    return [state for state in states if state in leading]
