"""The configurations that a planner tries: which devices make which stages, and how the batch is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConstraintError
from .cluster import Cluster

Groups = tuple[tuple[int, ...], ...]
# Up to so many devices every number of stages is tried, with unequal replicas; above, the divisors of their number.
FEW_DEVICES = 8
MOST_STAGES = 64
_PIECES_PER_STAGE = (1, 2, 4)
_ROWS = (1, 2, 4, 8)  # of a microbatch, on many devices: few sizes, so that few have to be priced


@dataclass(frozen=True)
class Wishes:
    """What the user fixed; None leaves the choice to the planner.

    Attributes:
        n_microbatches, schedule, n_stages: as in a plan.
        recompute: True for all stages, False for none; None where memory asks for it.
        costs: ``"measured"`` or ``"analytic"``.
        assignment: maps every op to a stage and replaces the search for a cut.
        all_devices: every device must be used (under torchrun, where each is a rank that waits).
    """

    n_microbatches: int | None = None
    schedule: str | None = None
    costs: str = "measured"
    assignment: dict[str, int] | None = None
    n_stages: int | None = None
    recompute: bool | None = None
    all_devices: bool = False


def uniform_groups(cluster: Cluster, wishes: Wishes) -> list[Groups]:
    """List the ways to make stages of equally many devices, each of one kind; one device is the first of them.

    Where a cluster has several hosts, both placements are tried: replicas of a stage side by side, and stages side by
    side. Fixed groups are the only way if the cluster has them.
    """
    if cluster.groups is not None:
        return [cluster.groups]
    n = cluster.n_devices
    ways: dict[Groups, None] = {}
    if not wishes.all_devices and wishes.n_stages in (None, 1):
        for kind in cluster.kinds:
            ways[((next(i for i in range(n) if cluster.devices[i].kind == kind),),)] = None
    for n_stages in stage_counts(n, wishes):
        if n % n_stages:
            continue
        n_replicas = n // n_stages
        side_by_side = tuple(tuple(range(s * n_replicas, (s + 1) * n_replicas)) for s in range(n_stages))
        across = tuple(tuple(range(s, n, n_stages)) for s in range(n_stages))
        for groups in (side_by_side, across) if _spans_hosts(cluster) else (side_by_side,):
            if all(len({cluster.devices[i].kind for i in group}) == 1 for group in groups):
                ways[groups] = None
    return list(ways)


def _spans_hosts(cluster: Cluster) -> bool:
    return len({device.host for device in cluster.devices}) > 1


def stage_counts(n_devices: int, wishes: Wishes) -> list[int]:
    """List the numbers of stages to try.

    Raises:
        ConstraintError: more stages are wished for than there are devices.
    """
    if wishes.n_stages is not None:
        if not 1 <= wishes.n_stages <= n_devices:
            raise ConstraintError(f"stages must be 1 to the number of devices, {n_devices}; got {wishes.n_stages}")
        return [wishes.n_stages]
    if n_devices <= FEW_DEVICES:
        return list(range(1, n_devices + 1))
    return [count for count in range(1, min(n_devices, MOST_STAGES) + 1) if n_devices % count == 0]


def microbatch_counts(wishes: Wishes, groups: Groups, batch_rows: int, fixed_rows: bool) -> list[int]:
    """List the numbers of pieces, per replica of the widest stage, to try.

    Raises:
        ConstraintError: the wish is not positive.
    """
    if wishes.n_microbatches is not None:
        if wishes.n_microbatches < 1:
            raise ConstraintError(f"microbatches must be at least 1, got {wishes.n_microbatches}")
        return [wishes.n_microbatches]
    if fixed_rows:
        return [1]
    n_replicas = max(len(group) for group in groups)
    most = max(1, batch_rows // n_replicas)
    if len(groups) > FEW_DEVICES or n_replicas > FEW_DEVICES:
        return sorted({most // rows for rows in _ROWS if most // rows >= 1})
    return sorted({min(most, len(groups) * factor) for factor in _PIECES_PER_STAGE})


def rows_of(groups: Sequence[Sequence[int]], n_microbatches: int, batch_rows: int) -> int:
    """Return the rows of the largest microbatch."""
    n_replicas = max(len(group) for group in groups)
    return -(-batch_rows // min(batch_rows, n_microbatches * n_replicas))
