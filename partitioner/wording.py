"""Words for numbers in messages."""

from __future__ import annotations


def count(n: int, what: str) -> str:
    """Name so many of something.

    >>> count(1, "stage"), count(2, "batch")
    ('1 stage', '2 batches')
    """
    plural = f"{what}es" if what.endswith("h") else f"{what}s"
    return f"{n} {what if n == 1 else plural}"
