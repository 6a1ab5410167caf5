"""The choice between the search for small graphs, over sets of nodes, and the one for large graphs, by segments."""

from __future__ import annotations

import time

from . import cut_search
from .cut_search import Outcome, OutOfTime
from .large_search import search_large
from .proving import FEW
from .reduction import Dag
from .slots import Slots
from .together import search_together

LARGE = 400  # nodes, once reduced
_NODE_S = 1e-5  # time to read a node's costs into tables


def search(dag: Dag, slots: Slots, deadline: float, max_downsets: int, at_least_s: float = 0.0) -> Outcome:
    """Find the best cut, or the best known with a proven lower bound where time or downsets run out.

    ``at_least_s`` is a lower bound that is known already.
    """

    def by_size(part: Dag, filled: Slots, deadline: float) -> Outcome:
        known_s = at_least_s if filled is slots else 0.0  # it says nothing of cuts with empty stages
        if not _by_segments(part, filled):
            return cut_search.search(part, filled, deadline, max_downsets, known_s)
        return search_large(part, filled, max_downsets, _Clock(deadline), at_least_s=known_s)

    return search_together(dag, slots, deadline, by_size, at_least_s)


def any_solution(dag: Dag, slots: Slots, time_limit_s: float) -> Outcome:
    """Find a cut that meets the constraints, good or bad, or the proof that there is none, if that is soon."""
    if not _by_segments(dag, slots):
        return cut_search.any_solution(dag, slots, time_limit_s)
    clock = _Clock(time.monotonic() + time_limit_s + _NODE_S * len(dag))
    return search_large(dag, slots, FEW, clock, first_only=True)


def _by_segments(dag: Dag, slots: Slots) -> bool:
    """Say whether the search by segments is for this problem: it knows sums and transfers, and one device a stage."""
    plain = dag.burdens is None and slots.most_replicas == 1 and slots.starts == (0,)
    return plain and len(dag) > LARGE


class _Clock:
    """Raises when the deadline has passed."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def __call__(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime
