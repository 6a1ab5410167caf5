"""The choice between the search for small graphs, over sets of nodes, and the one for large graphs, by segments."""

from __future__ import annotations

import time

from . import cut_search
from .cut_search import Outcome, OutOfTime, Solution
from .large_search import search_large
from .reduction import Dag
from .slots import Slots

LARGE = 400  # nodes, once reduced
_NODE_S = 1e-5  # time to read a node's costs into tables


def search(dag: Dag, slots: Slots, deadline: float, max_downsets: int) -> Outcome:
    """Find the best cut, or the best known with a proven lower bound where time or downsets run out."""
    if len(dag) <= LARGE:
        return cut_search.search(dag, slots, deadline, max_downsets)
    return search_large(dag, slots, max_downsets, _Clock(deadline))


def any_solution(dag: Dag, slots: Slots) -> Solution | None:
    """Find a cut that meets the constraints, good or bad; None says only that none was found soon."""
    if len(dag) <= LARGE:
        return cut_search.any_solution(dag, slots)
    clock = _Clock(time.monotonic() + 0.2 + _NODE_S * len(dag))
    return search_large(dag, slots, cut_search.FEW, clock, first_only=True).solution


class _Clock:
    """Raises when the deadline has passed."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def __call__(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime
