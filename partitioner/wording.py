"""Words for numbers in messages."""

from __future__ import annotations


def count(n: int, what: str) -> str:
    """Name so many of something.

    >>> count(1, "stage"), count(2, "batch")
    ('1 stage', '2 batches')
    """
    plural = f"{what}es" if what.endswith("h") else f"{what}s"
    return f"{n} {what if n == 1 else plural}"


def ms(seconds: float) -> str:
    """Write seconds as milliseconds with three digits, and never with an exponent for being long.

    >>> ms(0.0123456), ms(1.8812)
    ('12.3 ms', '1881 ms')
    """
    value = seconds * 1e3
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"
