"""Trials: a few real steps of several engines in turn, to tell apart what predictions cannot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_MOST_ROUNDS = 8
_LEAST_ROUNDS = 2
_STEPS_A_ROUND = 2
# Steps that the shortest trial takes of each: one to get going, and in each round one whose memory is cold.
LEAST_STEPS = 1 + _LEAST_ROUNDS * (1 + _STEPS_A_ROUND)

Step = Callable[[], None]


@dataclass(frozen=True)
class Trial:
    """Seconds of each contender's steps: the median, of so many."""

    step_s: tuple[float, ...]
    n_steps: int


def try_steps(
    contenders: Sequence[Step], allowed_s: float, progress: Callable[[str, int, int], None] | None = None
) -> Trial:
    """Time steps of several contenders in turn, so that a machine that changes its pace changes it for all.

    Ends when ``allowed_s`` have passed, when one contender's slowest step is faster than the others' fastest, or after
    eight rounds; never before two.
    """
    start = time.perf_counter()
    times: list[list[float]] = [[] for _ in contenders]
    for step in contenders:
        step()
    for done in range(_MOST_ROUNDS):
        if progress is not None:
            progress("trying plans", done, _MOST_ROUNDS)
        round_start = time.perf_counter()
        for step, own in zip(contenders, times):
            step()
            own.extend(_seconds(step) for _ in range(_STEPS_A_ROUND))
        now = time.perf_counter()
        if done + 1 >= _LEAST_ROUNDS and (_is_clear(times) or 2 * now - round_start - start > allowed_s):
            break
    return Trial(tuple(map(statistics.median, times)), len(times[0]))


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _is_clear(times: Sequence[Sequence[float]]) -> bool:
    """Say whether one was always faster than all others."""
    best = min(times, key=statistics.median)
    return all(max(best) < min(other) for other in times if other is not best)
