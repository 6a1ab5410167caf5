"""The cut with several chunks per device: an exact search where the graph is small, else annealing and bounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..errors import ConstraintError, InfeasibleError
from .chunk_bounds import node_bound_s, packing_bound_s, share_bound_s
from .chunk_costs import ChunkProblem, Placement, Scorer, compact
from .chunk_exact import MOST_ROWS, best_below
from .chunk_rows import TooManyRows
from .chunk_search import Schedule, anneal
from .cut_input import pinned_pairs
from .cut_search import OutOfTime
from .dispatch import search
from .filling import Grouping, any_order
from .proving import TOLERANCE
from .reduction import Ints, contract

_FEW_PLACEMENTS = 2e6  # devices ** nodes up to which listing them comes before annealing
_BRIEF = Schedule(n_steps=300, n_rounds=1)
_NODE_STEPS = 13_000_000  # nodes x steps of the narrow annealing
_CONTIGUOUS = 0.3  # part of the time that the start may take
_MOST_DOWNSETS = 200_000
# Parts of the time after which the early bounds, the long narrow annealing and the short broad one end.
_BOUNDED, _NARROW, _BROAD = 0.2, 0.8, 0.94
_PACKABLE = 64  # nodes up to which placing node after node is likely to end with a bound worth waiting for
_EARLY_ROWS, _LATE_ROWS = (1_000, 8_000), (8_000, 16_000)


@dataclass(frozen=True)
class ChunkOutcome:
    """What was found, and what is known: ``proven`` if nothing better exists (or nothing at all)."""

    placement: Placement  # the best, or the closest to what is allowed
    is_allowed: bool
    lower_bound_s: float
    proven: bool


def place_chunks(problem: ChunkProblem, start: Placement | None, deadline: float) -> ChunkOutcome:
    """Find the best placement of at most ``max_chunks`` chunks per device, from a start if there is one."""
    begin = time.monotonic()
    search = _Search(problem, start or _spread(problem), deadline)
    search.bound(partial(node_bound_s, problem, search.limit_s, search.check_time))
    n_placements = float(len(problem.devices)) ** len(problem.dag)
    if n_placements <= _FEW_PLACEMENTS:
        search.anneal(_BRIEF, deadline)
        search.list_all(MOST_ROWS)
    for most_rows in _EARLY_ROWS if len(problem.dag) <= _PACKABLE else ():
        search.pack(most_rows, begin + _BOUNDED * (deadline - begin))
    steps = max(2_000, min(75_000, _NODE_STEPS // len(problem.dag)))
    first = search.best
    search.anneal(Schedule(n_steps=steps), begin + _NARROW * (deadline - begin))
    broad = Schedule(n_steps=steps // 3, n_chains=64, n_rounds=2, power=48.0)
    search.anneal(broad, begin + _BROAD * (deadline - begin), first)
    for most_rows in _LATE_ROWS:
        search.pack(most_rows, deadline)
        search.list_all(most_rows)
    return search.outcome()


class _Search:
    """The best placement so far, allowed or not, and the bound below which there is none."""

    def __init__(self, problem: ChunkProblem, start: Placement, deadline: float) -> None:
        self.problem, self.best, self.deadline = problem, start, deadline
        self.until = deadline
        self.lower_bound_s = share_bound_s(problem)
        self.proven = False

    def check_time(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfTime

    @property
    def limit_s(self) -> float:
        """The load to stay below: a little less than the best known."""
        return min(self.best.max_load_s * (1 - TOLERANCE), self.problem.ceiling_s)

    @property
    def closed(self) -> bool:
        return self.proven or self.limit_s <= self.lower_bound_s

    def bound(self, compute: Callable[[], float]) -> None:
        """Raise the lower bound, if time allows."""
        if self.closed:
            return
        try:
            self.lower_bound_s = max(self.lower_bound_s, compute())
        except (OutOfTime, TooManyRows):
            return

    def pack(self, most_rows: int, until: float) -> None:
        self.until = until
        self.bound(partial(packing_bound_s, self.problem, self.limit_s, most_rows, self.check_time))
        self.until = self.deadline

    def anneal(self, schedule: Schedule, deadline: float, start: Placement | None = None) -> None:
        """Anneal from the best placement or from another, and keep what is better."""
        if not self.closed:
            target_s = self.lower_bound_s * (1 + TOLERANCE)
            found = anneal(self.problem, start or self.best, schedule, min(deadline, self.deadline), target_s)
            self.best = min(self.best, found, key=lambda placement: placement.max_load_s)

    def list_all(self, most_rows: int) -> None:
        """Prove the best placement, or find a better one, by listing all that can be better."""
        if self.closed:
            return
        try:
            found = best_below(self.problem, self.limit_s, most_rows, self.check_time)
        except (OutOfTime, TooManyRows):
            return
        self.best, self.proven = found or self.best, True

    def outcome(self) -> ChunkOutcome:
        is_allowed = self.best.max_load_s < self.problem.ceiling_s
        proven = self.proven or (is_allowed and self.closed)
        return ChunkOutcome(self.best, is_allowed, self.lower_bound_s, proven)


def contiguous_start(
    problem: ChunkProblem, kinds: Sequence[str], in_flight: Sequence[int], deadline: float
) -> Placement | None:
    """Find a cut with one chunk per device; None if there is none, or the devices are of too many sorts for it."""
    now = time.monotonic()
    dag = contract(problem.dag, pinned_pairs(problem.dag.pins))
    if max(map(len, dag.pins)) > 1 or not np.isfinite(dag.least_s).all():
        return None
    most_held = (max(in_flight),) * len(problem.devices)
    try:
        grouping = Grouping(pinned=frozenset[int]().union(*dag.pins))
        slots = any_order(problem.devices, kinds, most_held, grouping)
    except ConstraintError:
        return None
    found = search(dag, slots, now + _CONTIGUOUS * (deadline - now), _MOST_DOWNSETS).solution
    if found is None:
        return None
    unused = [list(group) for group in slots.classes]
    device = np.array([unused[c].pop(0) for c in found.classes], dtype=np.int64)
    stage_of = {node: s for s, nodes in enumerate(found.stages) for node in nodes}
    return _placed(problem, np.array([stage_of[members[0]] for members in problem.dag.members]), device)


def misses(problem: ChunkProblem, outcome: ChunkOutcome) -> InfeasibleError:
    """Build the error for a graph that no placement was found for, from the closest one."""
    chunks = f"at most {problem.max_chunks} chunks per device"
    certainty = (
        f"no cut into {chunks}" if outcome.proven else f"no cut into {chunks} was found (not proven: none exists) that"
    )
    device_of = outcome.placement.device[outcome.placement.position]
    held = [float(problem.bytes[device_of == d, d].sum()) for d in range(len(problem.devices))]
    worst = int(np.argmax(np.array(held) - problem.limits))
    excess = held[worst] - float(problem.limits[worst])
    if excess <= 0:
        return InfeasibleError(
            f"{certainty} meets the pins and the kinds that nodes can run on",
            hint="drop a pin, allow more kinds, or raise max_chunks" + ("" if outcome.proven else " or time_limit_s"),
        )
    return InfeasibleError(
        f"{certainty} fits in memory: the closest one found puts {held[worst]:,.0f} bytes on "
        f"{problem.devices[worst].name!r}, {excess:,.0f} more than its {problem.limits[worst]:,.0f}",
        hint="raise the limits, or use more devices" + ("" if outcome.proven else ", or raise time_limit_s"),
    )


def _placed(problem: ChunkProblem, position: Ints, device: Ints) -> Placement:
    return compact(position, device, float(Scorer(problem).loads(device[position][None]).max()))


def _spread(problem: ChunkProblem) -> Placement:
    """Deal equal parts of the work to all chunks in topological order, device after device; allowed or not."""
    work = np.maximum(np.where(np.isfinite(problem.least_s), problem.least_s, 0.0), 1e-12 * problem.ceiling_s)
    part = (np.cumsum(work) - work / 2) / work.sum()
    device = np.tile(np.arange(len(problem.devices)), problem.max_chunks)
    return _placed(problem, np.minimum(part * len(device), len(device) - 1).astype(np.int64), device)
