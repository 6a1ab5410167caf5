"""Placements: which worker owns which stages, as data."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConstraintError
from ..instructions import Action, Layout

Positions = tuple[tuple[int, ...], ...]  # the stages of the first worker of a pipeline, of the second, ...


def chain(n_workers: int, n_chunks: int = 1) -> Layout:
    """Place ``n_chunks`` neighbouring stages on each worker.

    >>> chain(2, 2).workers
    ((0,), (0,), (1,), (1,))
    """
    return _layout(_chain(n_workers, n_chunks))


def loop(n_workers: int, n_chunks: int) -> Layout:
    """Place stage s on worker s mod ``n_workers``, so that a microbatch passes all workers ``n_chunks`` times.

    >>> loop(2, 2).workers
    ((0,), (1,), (0,), (1,))
    """
    return _layout(_loop(n_workers, n_chunks))


def vee(n_workers: int) -> Layout:
    """Place two stages on each worker, there and back: the first worker has the first and the last.

    >>> vee(2).workers
    ((0,), (1,), (1,), (0,))
    """
    return _layout(_vee(n_workers, 2))


def _chain(n_workers: int, n_chunks: int) -> Positions:
    return tuple(tuple(range(w * n_chunks, (w + 1) * n_chunks)) for w in range(n_workers))


def _loop(n_workers: int, n_chunks: int) -> Positions:
    return tuple(tuple(range(w, n_workers * n_chunks, n_workers)) for w in range(n_workers))


def _vee(n_workers: int, n_chunks: int) -> Positions:
    assert n_chunks == 2, "there and back"
    return tuple((w, 2 * n_workers - 1 - w) for w in range(n_workers))


PLACEMENTS = {"chain": _chain, "loop": _loop, "vee": _vee}


def _layout(positions: Positions) -> Layout:
    owner = {s: (w,) for w, stages in enumerate(positions) for s in stages}
    wires = tuple((s, s + 1) for s in range(len(owner) - 1))
    return Layout(tuple(owner[s] for s in range(len(owner))), wires, wires)


@dataclass(frozen=True)
class Column:
    """One pipeline through all stages: a worker for each of ``positions``, and the microbatches that pass it."""

    workers: tuple[int, ...]
    positions: Positions
    microbatches: range


def columns(name: str, layout: Layout, n_microbatches: int) -> list[Column]:
    """Take a layout apart into its pipelines, one per replica.

    Raises:
        ConstraintError: stages have different replica counts, or replicas different stages.
    """
    counts = sorted({len(owners) for owners in layout.workers})
    if len(counts) > 1:
        raise ConstraintError(
            f"{name} needs the same number of replicas in every stage, got {counts[0]} to {counts[-1]}",
            hint="1f1b and fill-drain allow different counts",
        )
    found = []
    for r in range(counts[0]):
        stages_of: dict[int, list[int]] = {}
        for s, owners in enumerate(layout.workers):
            stages_of.setdefault(owners[r], []).append(s)
        mine = layout.microbatches_of(0, r, n_microbatches)
        found.append(Column(tuple(stages_of), tuple(map(tuple, stages_of.values())), mine))
    workers = [w for column in found for w in column.workers]
    if len({column.positions for column in found}) > 1 or len(set(workers)) < len(workers):
        raise ConstraintError(f"{name} needs replicas that own the same stages")
    return found


def require(name: str, column: Column, placement: str, n_chunks: int | None = None) -> int:
    """Return how many stages each worker owns, all by ``placement``.

    Raises:
        ConstraintError: they are placed otherwise, or are not ``n_chunks``.
    """
    n_workers, owned = len(column.workers), len(column.positions[0])
    wanted = owned if n_chunks is None else n_chunks
    if owned != wanted or column.positions != PLACEMENTS[placement](n_workers, wanted):
        many = "equally many stages" if n_chunks is None else f"{wanted} stage{'s' if wanted > 1 else ''}"
        raise ConstraintError(
            f"{name} needs {many} per worker, placed as a {placement}; got {list(map(list, column.positions))}"
        )
    return owned


def on_stages(kind: str, stages: tuple[int, ...], microbatch: int) -> list[Action]:
    """Compute one microbatch on neighbouring stages of a worker, as if they were one stage."""
    return [Action(kind, s, microbatch) for s in (stages if kind == "F" else reversed(stages))]
