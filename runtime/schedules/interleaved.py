"""Interleaved schedules: each worker owns several stages, and a microbatch passes all workers several times.

Interleaved 1F1B (Narayanan et al., 2021, https://arxiv.org/abs/2104.04473, 2.2): with v stages per worker the bubble
of 1F1B becomes (p - 1) / v forwards and backwards; worker w forwards 2 (p - 1 - w) + (v - 1) p stages of microbatches
ahead. Microbatches go in groups of p; counts that p does not divide go in groups of p and a few more. The interleaved
zero-bubble schedule splits the backwards, forwards (p - 1 - w) + (v - 1) p ahead, and lags w weight gradients behind.
"""

from __future__ import annotations

from itertools import pairwise

Unit = tuple[str, int, int]  # kind, which of the worker's stages, microbatch


def _groups(n_workers: int, n_microbatches: int) -> list[range]:
    """Divide microbatches into groups as even as can be, of at least as many as there are workers.

    >>> _groups(3, 11), _groups(3, 2)
    ([range(0, 4), range(4, 8), range(8, 11)], [range(0, 2)])
    """
    count = max(1, n_microbatches // n_workers)
    size, larger = divmod(n_microbatches, count)
    starts = [g * size + min(g, larger) for g in range(count + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def _rounds(groups: list[range], n_chunks: int, *, back: bool) -> list[tuple[int, int]]:
    """List (chunk, microbatch), group by group."""
    chunks = range(n_chunks)[::-1] if back else range(n_chunks)
    return [(c, m) for group in groups for c in chunks for m in group]


def _order(early: int, n_workers: int, n_chunks: int, n_microbatches: int) -> list[Unit]:
    """Forward all chunks but the last of the first group and ``early`` more, then alternate."""
    groups = _groups(n_workers, n_microbatches)
    forwards = _rounds(groups, n_chunks, back=False)
    backwards = _rounds(groups, n_chunks, back=True)
    ahead = min((n_chunks - 1) * len(groups[0]) + early + 1, len(forwards))
    order = [("F", *unit) for unit in forwards[:ahead]]
    for place, unit in enumerate(backwards):
        order.append(("B", *unit))
        if ahead + place < len(forwards):
            order.append(("F", *forwards[ahead + place]))
    return order


def order_1f1b(position: int, n_workers: int, n_chunks: int, n_microbatches: int) -> list[Unit]:
    """Return one worker's order of interleaved 1F1B."""
    return _order(2 * (n_workers - 1 - position), n_workers, n_chunks, n_microbatches)


def order_zero_bubble(position: int, n_workers: int, n_chunks: int, n_microbatches: int) -> list[Unit]:
    """Return one worker's order of the interleaved zero-bubble schedule."""
    split: list[Unit] = []
    waiting: list[Unit] = []
    for kind, c, m in _order(n_workers - 1 - position, n_workers, n_chunks, n_microbatches):
        split.append(("I" if kind == "B" else kind, c, m))
        if kind == "B":
            waiting.append(("W", c, m))
            if len(waiting) > position:
                split.append(waiting.pop(0))
    return split + waiting
