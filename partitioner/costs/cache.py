"""Measured costs on disk."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress

from ..cpu import cache_folder

_CACHE_VERSION = 9
# Costs of now and of then can be compared only where the machine is as fast as it was: a plan once took 4 microbatches
# whose costs were from a fast hour over 1 whose costs were from a slow one, and was 11 % slower.
_SAME_COMPUTE = 1.15
_SAME_BANDWIDTH = 1.4  # memory is what guests of one machine share most


class Cache:
    """Measured seconds (forward, backward, and of that for weights) on disk, one JSON file.

    Entries carry the pace of the machine (FLOP/s, bytes/s) when they were measured; those of another pace than now are
    not known. A file that cannot be read is measured again and replaced.
    """

    def __init__(self, pace: tuple[float, float] = (1.0, 1.0)) -> None:
        self.path = cache_folder() / f"costs-{_CACHE_VERSION}.json"
        self.pace = pace
        self._kept: dict[str, list[float]] = {}
        self.known: dict[str, tuple[float, float, float]] = {}
        with suppress(OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
            found = {key: list(map(float, entry)) for key, entry in json.loads(self.path.read_text()).items()}
            if all(0 <= number < math.inf for entry in found.values() for number in entry):
                self.known = {key: (f, b, w) for key, (f, b, w, *then) in found.items() if self._is_of_now(*then)}
                self._kept = found

    def _is_of_now(self, compute: float, bandwidth: float) -> bool:
        within = (_SAME_COMPUTE, _SAME_BANDWIDTH)
        return all(1 / most <= now / then <= most for now, then, most in zip(self.pace, (compute, bandwidth), within))

    def save(self) -> None:
        """Replace the file in one step; costs that cannot be kept are only measured again."""
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        entries = self._kept | {key: [*seconds, *self._pace_of(key, seconds)] for key, seconds in self.known.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(entries))
            os.replace(temporary, self.path)
        except OSError as error:
            print(f"stagecut: measured costs are not kept ({error})", file=sys.stderr)

    def _pace_of(self, key: str, seconds: tuple[float, float, float]) -> tuple[float, ...]:
        """Keep the pace of an entry that was not measured again."""
        before = self._kept.get(key)
        return tuple(before[3:]) if before and tuple(before[:3]) == seconds else self.pace
