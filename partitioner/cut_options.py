"""What may vary in a cut: the order, the number of stages, replicas, microbatches in flight, and recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from ..errors import ConstraintError
from .burdens import Recompute
from .filling import InFlight, OneForwardOneBackward


@dataclass(frozen=True)
class Options:
    """The options of ``cut.solve``, checked."""

    ordered: bool
    n_stages: int | None
    max_replicas: int
    in_flight: InFlight
    recompute: Recompute

    def held(self, position: int, replicas: int, n_to_end: int) -> int:
        """The microbatches in flight in a stage, with the devices from it to the end."""
        if isinstance(self.in_flight, OneForwardOneBackward):
            return self.in_flight.held(replicas, n_to_end)
        return self.in_flight[position]

    def most_in_flight(self, n_devices: int) -> int:
        """The most microbatches that a stage holds."""
        if isinstance(self.in_flight, OneForwardOneBackward):
            return self.in_flight.held(1, n_devices)
        return max(self.in_flight)

    def with_at_most(self, in_flight: int) -> Options:
        """The same with no more than so many microbatches in flight."""
        if isinstance(self.in_flight, OneForwardOneBackward):
            return replace(self, in_flight=OneForwardOneBackward(in_flight))
        return replace(self, in_flight=tuple(min(count, in_flight) for count in self.in_flight))

    def with_stages(self, n_stages: int | None, n_devices: int) -> Options:
        """The same for other numbers of stages and devices, where every stage holds as many microbatches."""
        if isinstance(self.in_flight, OneForwardOneBackward):
            return replace(self, n_stages=n_stages)
        n_positions = n_devices if n_stages is None else n_stages
        return replace(self, n_stages=n_stages, in_flight=(self.in_flight[0],) * n_positions)

    @property
    def depends_on_position(self) -> bool:
        """Whether stages hold other counts of microbatches if an empty stage comes before them."""
        return not isinstance(self.in_flight, OneForwardOneBackward) and len({*self.in_flight}) > 1


def read_options(
    n_devices: int,
    *,
    ordered: bool,
    n_stages: int | None,
    max_replicas: int,
    in_flight: Sequence[int] | str | None,
    n_microbatches: int | None,
    recompute: Recompute,
) -> Options:
    """Check each option against the others and the number of devices.

    Raises:
        ConstraintError: an option is out of its range, or two contradict each other.
    """
    if max_replicas < 1:
        raise ConstraintError(f"max_replicas must be at least 1, but it is {max_replicas}")
    if recompute not in get_args(Recompute):
        raise ConstraintError(f"recompute must be one of {list(get_args(Recompute))}, but it is {recompute!r}")
    if n_stages is not None:
        least = -(-n_devices // max_replicas) if ordered else 1
        if not least <= n_stages <= n_devices:
            raise ConstraintError(
                f"n_stages must be {least} to {n_devices} for {n_devices} devices"
                + (f", all used, at most {max_replicas} per stage" if ordered else "")
                + f", but it is {n_stages}"
            )
    held = _in_flight(in_flight, n_microbatches, n_devices if n_stages is None else n_stages)
    return Options(ordered, n_stages, max_replicas, held, recompute)


def _in_flight(in_flight: Sequence[int] | str | None, n_microbatches: int | None, n_positions: int) -> InFlight:
    if isinstance(in_flight, str):
        if in_flight != "1f1b":
            raise ConstraintError(f"in_flight must be counts or '1f1b', but it is {in_flight!r}")
        if n_microbatches is None or n_microbatches < 1:
            raise ConstraintError(
                f"in_flight='1f1b' needs n_microbatches of at least 1, but it is {n_microbatches}",
                hint="pass n_microbatches, the microbatches of one step",
            )
        return OneForwardOneBackward(n_microbatches)
    if n_microbatches is not None:
        raise ConstraintError(
            "n_microbatches has no effect on counts of microbatches in flight that are given",
            hint="drop n_microbatches, or pass in_flight='1f1b'",
        )
    held = (1,) * n_positions if in_flight is None else tuple(in_flight)
    if len(held) != n_positions or min(held) < 0:
        raise ConstraintError(
            f"in_flight needs one count of at least 0 per stage there can be ({n_positions}), but it is {list(held)}"
        )
    return held
