"""Orders for workers that own one stage, or neighbouring ones: some forwards, then backward and forward in turn."""

from __future__ import annotations

Unit = tuple[str, int]  # kind and microbatch


def warm_then_alternate(held: int, n_microbatches: int) -> list[Unit]:
    """Return ``held`` forwards, then backward and forward in turn, then the backwards that are left.

    >>> " ".join(f"{kind}{m}" for kind, m in warm_then_alternate(2, 3))
    'F0 F1 B0 F2 B1 B2'
    """
    held = min(held, n_microbatches)
    order = [("F", m) for m in range(held)]
    for m in range(n_microbatches):
        order.append(("B", m))
        if held + m < n_microbatches:
            order.append(("F", held + m))
    return order


def delay_weights(order: list[Unit], delay: int) -> list[Unit]:
    """Split each backward: its input part stays, its weight part follows the input part ``delay`` backwards later.

    >>> " ".join(f"{kind}{m}" for kind, m in delay_weights(warm_then_alternate(2, 3), 1))
    'F0 F1 I0 F2 I1 W0 I2 W1 W2'
    """
    split: list[Unit] = []
    waiting: list[int] = []
    for kind, m in order:
        split.append(("I" if kind == "B" else kind, m))
        if kind == "B":
            waiting.append(m)
            if len(waiting) > delay:
                split.append(("W", waiting.pop(0)))
    return split + [("W", m) for m in waiting]
