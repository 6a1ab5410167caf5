"""Where in the source a module's forward does what capture cannot follow."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from typing import Any

_CHANGES = re.compile(r"its forward changes its own attribute '(\w+)'")


def place_of(forward: Callable[..., Any], reason: str, source: str | None) -> str | None:
    """Return ``file:line``: where it was noticed, or the line of forward that changes the attribute in question."""
    if source is None or reason.startswith("its forward"):
        found = _in_forward(forward, reason)
        source = found or source
    return None if source is None else nearby(source)


def nearby(source: str) -> str:
    """Write a place as a path from here, if it is below."""
    return source.removeprefix(os.path.join(os.getcwd(), ""))


def _in_forward(forward: Callable[..., Any], reason: str) -> str | None:
    forward = inspect.unwrap(forward)
    code = getattr(forward, "__code__", None)
    if code is None:
        return None
    changed = _CHANGES.search(reason)
    line = code.co_firstlineno + (_line_that_sets(forward, changed[1]) if changed else 0)
    return f"{code.co_filename}:{line}"


def _line_that_sets(forward: Callable[..., Any], attribute: str) -> int:
    """Count the lines before the one that sets ``self.attribute``, or else the first that mentions it."""
    try:
        lines = inspect.getsourcelines(forward)[0]
    except (OSError, TypeError):
        return 0
    sets = re.compile(rf"self\.{attribute}\b(\[.*?\])?\s*(,.*)?([-+*/%&|^@]|\*\*|//|<<|>>)?=(?!=)")
    mentions = re.compile(rf"self\.{attribute}\b")
    for wanted in (sets, mentions):
        for number, text in enumerate(lines):
            if wanted.search(text):
                return number
    return 0
