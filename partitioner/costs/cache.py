"""Measured costs on disk."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress

from ..cpu import cache_folder

_CACHE_VERSION = 7


class Cache:
    """Measured seconds (forward, backward, and of that for weights) on disk, one JSON file.

    A file that cannot be read is measured again and replaced.
    """

    def __init__(self) -> None:
        self.path = cache_folder() / f"costs-{_CACHE_VERSION}.json"
        self.known: dict[str, tuple[float, float, float]] = {}
        with suppress(OSError, ValueError, TypeError):
            found = json.loads(self.path.read_text()).items()
            self.known = {key: (float(f), float(b), float(w)) for key, (f, b, w) in found}

    def save(self) -> None:
        """Replace the file in one step; costs that cannot be kept are only measured again."""
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.known))
            os.replace(temporary, self.path)
        except OSError as error:
            print(f"stagecut: measured costs are not kept ({error})", file=sys.stderr)
