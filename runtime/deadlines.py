"""Deadlines: how long nothing may move in a step before it counts as stalled."""

from __future__ import annotations

import statistics
from collections import deque

START_S = 60.0  # imports, the first step
COMPILE_S = 600.0  # the same, where torch.compile takes minutes
LEAST_S = 30.0
RANK_S = 300.0  # that a rank of torchrun waits for another one, where nobody says
_TIMES_A_STEP = 20.0
_REMEMBERED = 32


class Deadlines:
    """Seconds without progress after which a step fails, by the program that it runs.

    What the user gave; or else 20 times the median of the last steps of that program, 30 s at least. Before there are
    such steps 20 times the step that the plan predicts, 60 s at least. Where stages are compiled, 600 s at least in any
    step: a new shape compiles them again.
    """

    def __init__(self, given_s: float | None = None, predicted_s: float = 0.0, *, compiles: bool = False) -> None:
        self._given_s = given_s
        self._least_s = COMPILE_S if compiles else LEAST_S
        self._first_s = max(START_S, self._least_s, _TIMES_A_STEP * predicted_s)
        self._seen: dict[object, deque[float]] = {}

    @property
    def start_s(self) -> float:
        """Return how long workers may take to start and to be set up."""
        return max(START_S, self._given_s or 0.0)

    def of(self, program: object) -> float:
        """Return the seconds for the next step of a program."""
        if self._given_s is not None:
            return self._given_s
        seen = self._seen.get(program)
        return max(self._least_s, _TIMES_A_STEP * statistics.median(seen)) if seen else self._first_s

    def note(self, program: object, step_s: float) -> None:
        """Learn how long a step took; the first one of a program is not counted."""
        if program in self._seen:
            self._seen[program].append(step_s)
        else:
            self._seen[program] = deque(maxlen=_REMEMBERED)

    def forget(self) -> None:
        """Begin anew, with workers that have done no step yet."""
        self._seen.clear()
