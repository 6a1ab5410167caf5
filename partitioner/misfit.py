"""Say why no cut exists: by how many bytes the closest one misses, on which device, and what would fit."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConstraintError, InfeasibleError
from .cut_input import show
from .cut_options import Options
from .cut_problem import Problem, prepare
from .cut_search import Outcome, Solution
from .dispatch import any_solution
from .filling import OneForwardOneBackward
from .reduction import Dag
from .slots import CutDevice, Slots, least_held
from .stage_costs import bytes_of

_MAX_HALVINGS = 16
_MAX_EXTRA_DEVICES = 16
_PATIENCE_S = 10.0  # for the whole explanation: what could not be tried by then is not advised


@dataclass(frozen=True)
class _Miss:
    """The stage that exceeds its devices' limit by most."""

    device: CutDevice
    needed_bytes: float
    excess_bytes: float


class _Trials:
    """Searches for any cut, each a few times as long as the one without limits took."""

    def __init__(self) -> None:
        self.each_s = 0.2
        self.deadline = time.monotonic() + _PATIENCE_S

    def without_limits(self, problem: Problem) -> Outcome:
        """Look for a cut whatever its bytes, or the proof that there is none."""
        start = time.monotonic()
        outcome = any_solution(problem.dag, _with_more_bytes(problem.slots, np.inf), _PATIENCE_S / 2)
        self.each_s = max(self.each_s, 3 * (time.monotonic() - start))
        return outcome

    def find(self, dag: Dag, slots: Slots) -> Solution | None:
        """Look for a cut; None says only that none was found soon."""
        left_s = min(self.each_s, self.deadline - time.monotonic())
        return any_solution(dag, slots, left_s).solution if left_s > 0 else None

    def fits(self, problem: Problem, devices: tuple[CutDevice, ...], options: Options) -> bool:
        """Tell whether a cut is found for other devices or options."""
        if time.monotonic() > self.deadline:
            return False
        try:
            other = prepare(problem.graph, devices, options)
        except (ConstraintError, InfeasibleError):
            return False
        return self.find(other.dag, other.slots) is not None


def explain(problem: Problem, proven: bool) -> InfeasibleError:
    """Build the error for a problem that no cut was found for.

    The bytes named are those of a cut that was found with larger limits: enough, though not proven to be least.  What
    is advised has been tried, and a cut was found.
    """
    trials = _Trials()
    if all(device.memory_bytes is None for device in problem.slots.devices):
        return _no_order(problem, proven)
    closest = trials.without_limits(problem)
    if closest.solution is None:
        return _no_order(problem, closest.proven)
    miss = _miss(problem, _closest(problem, closest.solution, trials))
    if miss is None:  # it uses devices without limits only: the search did not come to it
        return _no_order(problem, False)
    certainty = "no cut fits in memory" if proven else "no cut that fits in memory was found (not proven: none exists)"
    message = (
        f"{certainty}: the closest one found puts {math.ceil(miss.needed_bytes):,} bytes on {miss.device.name!r}, "
        f"{math.ceil(miss.excess_bytes):,} more than its {miss.device.memory_bytes:,.0f}"
    )
    too_large = _too_large(problem)
    advice = [f"raise every limit by {math.ceil(miss.excess_bytes):,} bytes"]
    if too_large:
        message += f"; {too_large}"
    else:
        advice += _more_devices(problem, trials)
    advice += [*_other_recompute(problem, trials), *_fewer_in_flight(problem, trials)]
    return InfeasibleError(message, hint=", or ".join(advice))


def _no_order(problem: Problem, proven: bool) -> InfeasibleError:
    devices = show([f"{device.name} ({device.kind})" for device in problem.devices], most=16)
    if proven:
        stages = "" if problem.options.n_stages is None else f"{problem.options.n_stages} "
        return InfeasibleError(
            f"no cut into {stages}contiguous stages meets the pins and the kinds that nodes can run on; "
            f"devices: {devices}",
            hint="drop a pin, allow more kinds, or give the devices in another order",
        )
    return InfeasibleError(
        f"no cut was found before time or downsets ran out (not proven: none exists); devices: {devices}",
        hint="raise time_limit_s or max_downsets",
    )


def _with_more_bytes(slots: Slots, extra: float) -> Slots:
    """Raise every limit; by infinity means no limit."""
    devices = tuple(
        d if d.memory_bytes is None else replace(d, memory_bytes=None if extra == np.inf else d.memory_bytes + extra)
        for d in slots.devices
    )
    return replace(slots, devices=devices)


def _closest(problem: Problem, solution: Solution, trials: _Trials) -> Solution:
    """Halve the bytes by which every limit is raised while a cut is still found."""
    low, high = 0.0, _excess_bytes(problem, solution)
    for _ in range(_MAX_HALVINGS):
        if high - low <= 1.0:
            break
        middle = (low + high) / 2
        found = trials.find(problem.dag, _with_more_bytes(problem.slots, middle))
        if found is None:
            low = middle
        else:
            solution, high = found, min(middle, _excess_bytes(problem, found))
    return solution


def _excess_bytes(problem: Problem, solution: Solution) -> float:
    miss = _miss(problem, solution)
    return 0.0 if miss is None else miss.excess_bytes


def _miss(problem: Problem, solution: Solution) -> _Miss | None:
    """Return by how much the fullest device exceeds its limit; None if none that is used has one."""
    dag, slots, options = problem.dag, problem.slots, problem.options
    node_of = {member: v for v, members in enumerate(dag.members) for member in members}
    to_end = sum(solution.replicas)
    misses = []
    for s, (stage, c) in enumerate(zip(solution.stages, solution.classes)):
        held = options.held(s, solution.replicas[s], to_end)
        to_end -= solution.replicas[s]
        limit = slots.device(c).memory_bytes
        if limit is not None:
            nodes = sorted({node_of[member] for member in stage})
            needed = bytes_of(dag, nodes, held, again=solution.recompute[s])
            misses.append(_Miss(slots.device(c), needed, needed - limit))
    return max(misses, key=lambda miss: miss.excess_bytes, default=None)


def _too_large(problem: Problem) -> str:
    """Name the largest inseparable nodes that no device has room for, whatever the cut."""
    dag, held = problem.dag, least_held(problem.dag, problem.slots)
    least = np.array([bytes_of(dag, [v], held, again=False) for v in range(len(dag))])
    v = int(least.argmax())
    limits = [np.inf if d.memory_bytes is None else d.memory_bytes for d in problem.slots.devices]
    if least[v] <= max(limits):
        return ""
    return f"{show(dag.members[v])} alone need {least[v]:,.0f}, so more devices of this size do not help"


def _more_devices(problem: Problem, trials: _Trials) -> list[str]:
    """Find how many more of the largest device make a cut possible."""
    options, n = problem.options, len(problem.devices)
    if options.depends_on_position:
        return []  # a longer pipeline would hold other counts of microbatches
    largest = max(problem.devices, key=lambda d: np.inf if d.memory_bytes is None else d.memory_bytes)
    for extra in range(1, _MAX_EXTRA_DEVICES + 1):
        names = [f"{largest.name}, copy {i + 1}" for i in range(extra)]
        devices = (*problem.devices, *(replace(largest, name=name) for name in names))
        if trials.fits(problem, devices, options.with_stages(options.n_stages, n + extra)):
            return [f"use {n + extra} devices (with {extra} more like {largest.name!r} a cut exists)"]
        more = None if options.n_stages is None else options.n_stages + extra
        if more is not None and trials.fits(problem, devices, options.with_stages(more, n + extra)):
            return [f"use {n + extra} devices for {more} stages (with {extra} more like {largest.name!r} a cut exists)"]
    return []


def _other_recompute(problem: Problem, trials: _Trials) -> list[str]:
    """Try to let every stage choose whether it computes its forward again."""
    if problem.options.recompute == "choose":
        return []
    fits = trials.fits(problem, problem.devices, replace(problem.options, recompute="choose"))
    return ["pass recompute='choose' (with it a cut exists)"] if fits else []


def _fewer_in_flight(problem: Problem, trials: _Trials) -> list[str]:
    """Find the most microbatches in flight, below those asked for, with which a cut exists."""
    options = problem.options
    low, high = 0, options.most_in_flight(len(problem.devices))
    while high - low > 1:
        middle = (low + high) // 2
        if trials.fits(problem, problem.devices, options.with_at_most(middle)):
            low = middle
        else:
            high = middle
    if low == 0:
        return []
    if isinstance(options.in_flight, OneForwardOneBackward):
        return [f"pass n_microbatches={low}"]
    return [f"hold at most {low} microbatches in flight in a stage"]
