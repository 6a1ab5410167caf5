"""The proof that a cut is the best: exact searches below the best known load, or lower to raise the bound."""

from __future__ import annotations

from typing import Protocol, TypeVar

from .downsets import TooManyDownsets

FEW = 20_000
TOLERANCE = 1e-9  # relative: a cut that is better by less is not looked for

S = TypeVar("S")


class Provable(Protocol[S]):
    """A search with what it knows: the best cut, the bound below which there is none, and whether they meet."""

    best: S | None
    lower_bound_s: float
    proven: bool
    max_downsets: int

    @property
    def limit_s(self) -> float:
        """The load to stay below: a little less than the best known."""

    def exact(self, limit_s: float, most: int) -> S | None:
        """Find the best cut below the limit; None if there is none.

        Raises:
            TooManyDownsets: more than ``most`` downsets would have to be looked at.
        """


def is_closed(search: Provable[S]) -> bool:
    """Say whether the best known cut meets the bound."""
    return search.best is not None and search.limit_s <= search.lower_bound_s


def prove(search: Provable[S], fine: float) -> None:
    """Search exactly below the best known load; where that is too much, below lower limits, to raise the bound.

    With a limit below the upper bound there are fewer downsets: if a cut is found it is the optimum, and if none is,
    the limit is a lower bound. The limits are halved until the gap is the part ``fine`` of the upper bound.
    """
    search.proven |= is_closed(search)
    most = min(FEW, search.max_downsets)
    while not search.proven:
        _bisect(search, most, fine)
        if most == search.max_downsets:
            return
        most = min(8 * most, search.max_downsets)


def _bisect(search: Provable[S], most: int, fine: float) -> None:
    """Try the upper bound, then limits below it, with a number of downsets that can be looked at."""
    high = limit = search.limit_s
    while True:
        try:
            found = search.exact(limit, most)
        except TooManyDownsets:
            high = limit
        else:
            if found is not None or limit >= search.limit_s:
                search.best, search.proven = found or search.best, True
                return
            search.lower_bound_s = limit
        if high - search.lower_bound_s <= fine * high:
            return
        limit = (search.lower_bound_s + high) / 2
