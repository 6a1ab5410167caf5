"""A published schedule for given costs: its placement on the workers at hand, its order, its times."""

from __future__ import annotations

from ...errors import ConstraintError
from ...runtime.instructions import Layout
from ...runtime.schedules.families import FAMILIES
from ...runtime.schedules.placement import chain, loop, vee
from .clock import Problem
from .costs import PipelineCosts
from .score import Scored, score


def workers_of(costs: PipelineCosts, placement: str, n_workers: int | None = None) -> int:
    """Return the number of workers: as given, as many as have limits, or as the placement implies.

    Raises:
        ConstraintError: they contradict each other, or nothing tells.
    """
    limited = None if costs.memory_bytes is None else len(costs.memory_bytes)
    if n_workers is not None and limited is not None and n_workers != limited:
        raise ConstraintError(f"{n_workers} workers were asked for, and memory_bytes has {limited} limits")
    known = n_workers if n_workers is not None else limited
    if known is not None:
        return known
    if placement == "chain":
        return costs.n_stages
    if placement == "vee" and costs.n_stages % 2 == 0:
        return costs.n_stages // 2
    raise ConstraintError(
        f"{costs.n_stages} stages on how many workers?", hint='say it with --workers, or list "memory_bytes" per worker'
    )


def placed(n_stages: int, n_workers: int, placement: str) -> Layout:
    """Place stages on workers.

    Raises:
        ConstraintError: the placement does not allow so many, with the nearest count that it allows.
    """
    if placement == "vee":
        if n_stages != 2 * n_workers:
            raise ConstraintError(
                f"a V placement has two stages per worker: {2 * n_workers} on {n_workers} workers, got {n_stages}",
                hint=f"cut the model into {2 * n_workers} stages"
                + (f", or use {n_stages // 2} workers" if n_stages % 2 == 0 else ""),
            )
        return vee(n_workers)
    if n_workers < 1 or n_stages % n_workers or n_stages < n_workers:
        nearest = max(1, round(n_stages / max(1, n_workers))) * max(1, n_workers)
        raise ConstraintError(
            f"{n_stages} stages cannot be spread evenly over {n_workers} workers", hint=f"cut into {nearest} stages"
        )
    n_chunks = n_stages // n_workers
    return chain(n_workers, n_chunks) if placement == "chain" else loop(n_workers, n_chunks)


def family_schedule(name: str, costs: PipelineCosts, n_microbatches: int, n_workers: int | None = None) -> Scored:
    """Time a published schedule (:data:`stagecut.runtime.schedules.families.FAMILIES`) with given costs.

    Raises:
        ConstraintError: there is no such schedule, or it does not allow these stages, workers or microbatches.
        InfeasibleError: a worker holds more than its memory.
    """
    if name not in FAMILIES:
        raise ConstraintError(f"unknown schedule {name!r}; known: {', '.join(FAMILIES)}, search")
    if n_microbatches < 1:
        raise ConstraintError(f"a schedule needs at least one microbatch, got {n_microbatches}")
    family = FAMILIES[name]
    if family.splits_backward and not costs.split_backward:
        raise ConstraintError(
            f"{name} computes input and weight gradients apart, and split_backward is false",
            hint='set "split_backward": true, or take 1f1b',
        )
    layout = placed(costs.n_stages, workers_of(costs, family.placement, n_workers), family.placement)
    return score(name, Problem(costs, layout, n_microbatches), family.make(layout, n_microbatches))
