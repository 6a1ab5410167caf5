"""Checks of the numbers that a cost graph carries."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

from ..errors import ConstraintError


def positive(value: Any, what: str) -> float:
    """Return a finite number of at least 0.

    Raises:
        ConstraintError: it is none; ``what`` says whose.
    """
    found = float(value)
    if not 0.0 <= found < math.inf:
        raise ConstraintError(f"{what} must be a finite number of at least 0, but it is {value!r}")
    return found


def number(attributes: dict[str, Any], name: str, node: Hashable) -> float:
    """Return an attribute of a node, 0 if it is not there.

    Raises:
        ConstraintError: it is negative or not finite.
    """
    return positive(attributes.get(name, 0.0), f"{name} of node {node!r}")
