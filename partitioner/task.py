"""What is to be planned: the model, the devices and the wishes, with what answers questions about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import InfeasibleError
from .captured import Capture
from .cluster import Cluster
from .configurations import FEW_DEVICES, Wishes, rows_of
from .cutting import Cutter, Recompute, Stages
from .opgraph import held_state_bytes
from .pricing import Priced, Pricer, Progress

_SOLVE_S = 20.0


@dataclass(frozen=True)
class Task:
    """A model, devices and wishes.

    Attributes:
        batch_rows: rows of the batch that the plan is for.
        threads_of: CPU threads of each worker, for a number of workers.
        progress: is told what is being done.
        cutter: answers the same cut once.
        failures: why configurations were no choice, as they come up.
    """

    capture: Capture
    pricer: Pricer
    cluster: Cluster
    wishes: Wishes
    batch_rows: int
    threads_of: Callable[[int], int]
    progress: Progress
    cutter: Cutter = field(default_factory=lambda: Cutter(_SOLVE_S))
    failures: list[Exception] = field(default_factory=list)

    @property
    def has_fixed_rows(self) -> bool:
        """Say whether the model takes whole batches only."""
        return self.capture.inputs.rows is not None

    @property
    def few_devices(self) -> bool:
        """Say whether there are so few devices that every configuration is looked into."""
        return self.cluster.n_devices <= FEW_DEVICES

    @cached_property
    def state_bytes(self) -> int:
        """Return the bytes of parameters with gradients and optimizer state, whatever the size of a microbatch."""
        return held_state_bytes(self.capture)

    def price(self, cluster: Cluster, n_microbatches: int) -> Priced | None:
        """Return the costs at a configuration's microbatch size; None, and a failure, where the model refuses it."""
        try:
            return self.pricer.at(*self._size(cluster, n_microbatches))
        except Exception as error:
            self.failures.append(error)
            return None

    def has_price(self, cluster: Cluster, n_microbatches: int) -> bool:
        """Say whether a configuration's microbatch size has its price already."""
        return self.pricer.is_known(*self._size(cluster, n_microbatches))

    def _size(self, cluster: Cluster, n_microbatches: int) -> tuple[int, int]:
        """Return the rows of a microbatch, and the threads of a worker."""
        assert cluster.groups is not None
        return rows_of(cluster.groups, n_microbatches, self.batch_rows), self.threads_of(cluster.n_devices)

    def modes(self) -> tuple[Recompute, ...]:
        """List the ways to recompute that may be tried, in that order."""
        if self.wishes.recompute is None:
            # On many devices one search less: the answer is the same where nothing is recomputed.
            return ("never", "choose") if self.few_devices else ("choose",)
        return ("always",) if self.wishes.recompute else ("never",)

    def stages(
        self, priced: Priced, cluster: Cluster, schedule: str, n_pieces: int, mode: Recompute, limits: list[float]
    ) -> Stages:
        """Cut within limits, or take the user's own stages.

        Raises:
            InfeasibleError: no cut fits.
        """
        if self.wishes.assignment is not None:
            return Stages(dict(self.wishes.assignment), (mode == "always",) * cluster.n_stages)
        return self.cutter.cut(priced, cluster, schedule, n_pieces, mode, limits)

    def telling_failure(self) -> Exception:
        """Return the failure that says most: one that says what to do, else the first."""
        return next(filter(_says_what_to_do, self.failures), self.failures[0])


def _says_what_to_do(error: Exception) -> bool:
    return isinstance(error, InfeasibleError) and error.hint is not None
