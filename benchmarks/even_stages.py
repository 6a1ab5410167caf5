"""The most even stages of one captured graph that torch.distributed.pipelining can run too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

from rival_splits import nearest

from stagecut.partitioner.opgraph import OpNode

_WINDOW = 16  # places to each side that a cut is tried at
_LEAST = 0.5  # of an equal share, for each stage


def crossings(ops: Mapping[str, OpNode], results: frozenset[str]) -> list[frozenset[str]]:
    """Return, per place in the order of ``ops``, the values that cross it: made before it and used from it on.

    Place ``p`` is before op ``p``; at place 0 the model's inputs cross, and at the last one its ``results``.
    """
    users = [*(op.inputs for op in ops.values()), tuple(results)]
    last = {name: i for i, names in enumerate(users) for name in names}
    made = {name: i for i, name in enumerate(ops)}
    crossing: list[set[str]] = [set() for _ in users]
    for name, end in last.items():
        for place in range(made.get(name, -1) + 1, end + 1):
            crossing[place].add(name)
    return [frozenset(names) for names in crossing]


class EvenStages:
    """Chooses where the order of a graph's ops is cut, so that a step is as short as it can be.

    Stages of torch.distributed.pipelining pass values to the next stage only: no value may cross two cuts. Those that
    split a backward in two fail where a value that leaves the stage is used within it too, since what leaves a stage is
    detached in place: for them one value crosses each cut.
    """

    def __init__(self, crossing: Sequence[frozenset[str]], legal: Sequence[int], seconds: Sequence[float]) -> None:
        """Take what crosses each place, the places that may be cut at, and the seconds of each op, in order."""
        self.crossing = crossing
        self._places = [place for place in legal if not crossing[place] & crossing[0]]
        self._sums = [0.0, *accumulate(seconds)]

    def fits(self, places: Sequence[int]) -> bool:
        """Say whether no value crosses two of the cuts at ``places``, and no part has less than half of its share."""
        names = [self.crossing[place] for place in places]
        times = [self._sums[end] - self._sums[begin] for begin, end in pairwise((0, *places, len(self._sums) - 1))]
        least = _LEAST * self._sums[-1] / len(times)
        return min(times) >= least and len(frozenset().union(*names)) == sum(map(len, names))

    def narrow(self, n_parts: int) -> list[int]:
        """Return the places at which one value crosses, so many of them that ``n_parts`` nearly equal parts are left.

        Where there are fewer, all are returned.
        """
        places = [place for place in self._places if len(self.crossing[place]) == 1]
        shares = [self._sums[-1] * s / n_parts for s in range(1, n_parts)]
        if len(places) <= len(shares):
            return places
        return [places[i] for i in nearest([self._sums[place] for place in places], shares)]

    def search(self, n_stages: int, step_s: Callable[[Sequence[int]], float], *, narrow: bool) -> list[int]:
        """Move one cut at a time as long as ``step_s`` of the places falls, from equal shares where one value crosses.

        With ``narrow`` that stays so.

        Raises:
            ValueError: there are fewer places where one value crosses than cuts.
        """
        cuts = self.narrow(n_stages)
        if len(cuts) < n_stages - 1:
            raise ValueError(f"there are no {n_stages - 1} places for cuts that one value crosses")
        places = [place for place in self._places if len(self.crossing[place]) == 1 or not narrow]
        best, better = step_s(cuts), True
        while better:
            better = False
            for s in range(n_stages - 1):
                at = places.index(cuts[s])
                for place in places[max(0, at - _WINDOW) : at + _WINDOW + 1]:
                    moved = [*cuts[:s], place, *cuts[s + 1 :]]
                    if self.fits(moved) and (taken := step_s(moved)) < best:
                        cuts, best, better = moved, taken, True
        return cuts
