"""The configurations that a planner tries: which devices make which stages, and how the batch is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConstraintError
from ..runtime.schedules import TRAINING_SCHEDULES, Orders, placement_of
from ..runtime.schedules.tokens import shape_of
from .cluster import Cluster
from .placing import Groups, owners_of, placed
from .wording import count

# Up to so many devices every number of stages is tried, with unequal replicas; above, the divisors of their number.
FEW_DEVICES = 8
MOST_STAGES = 64
_PIECES_PER_STAGE = (1, 2, 4)
_CHUNKS = 2  # stages of each worker where there are several and nobody says how many
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
        orders: the order of each worker of one replica, where ``schedule`` is ``"given"``.
        optimizer: whose step is part of a training step.
        onednn_matmul: whether stages leave large products to oneDNN, so that they are measured that way.
    """

    n_microbatches: int | None = None
    schedule: str | None = None
    costs: str = "measured"
    assignment: dict[str, int] | None = None
    n_stages: int | None = None
    recompute: bool | None = None
    all_devices: bool = False
    orders: Orders = ()
    optimizer: str | None = None
    onednn_matmul: bool = False

    @property
    def family(self) -> str | None:
        """Return the published schedule that the user fixed."""
        return self.schedule if self.schedule in TRAINING_SCHEDULES else None


def uniform_groups(cluster: Cluster, wishes: Wishes) -> list[Groups]:
    """List the ways to make stages of equally many devices, each of one kind; one device is the first of them.

    Where a cluster has several hosts, both placements are tried: replicas of a stage side by side, and stages side by
    side. Groups may come back, for several stages on each device. Fixed groups are the only ones if the cluster has
    them.
    """
    if cluster.groups is not None and len(owners_of(cluster.groups)) < len(cluster.groups):
        return [cluster.groups]
    if wishes.orders:
        return [_for_orders(cluster, wishes.orders)]
    chains = [cluster.groups] if cluster.groups is not None else _chains(cluster, wishes)
    found = [groups for groups in chains if _is_wished(groups, "chain", wishes)]
    return found + [groups for groups in _with_chunks(chains, wishes, cluster) if groups not in found]


def wished_placement(wishes: Wishes) -> str | None:
    """Name the placement of the schedule that the user fixed; None where there is none, or one for any placement."""
    return None if wishes.family is None else placement_of(wishes.family)


def _for_orders(cluster: Cluster, orders: Orders) -> Groups:
    """Place stages as orders of one replica do; devices that are left over make more replicas.

    Raises:
        ConstraintError: the devices do not divide by the orders' workers.
    """
    owner, _ = shape_of(orders)
    n, p = cluster.n_devices, len(orders)
    groups = cluster.groups
    if groups is None and n % p == 0:
        groups = tuple(tuple(range(w * (n // p), (w + 1) * (n // p))) for w in range(p))
    if groups is None or len(groups) != p or len({len(group) for group in groups}) > 1:
        raise ConstraintError(
            f"the order is for {count(p, 'worker')} and their replicas, and devices are "
            f"{n if groups is None else [len(group) for group in groups]}",
            hint=f"give {p} devices, or a multiple of {p}",
        )
    return tuple(groups[worker] for worker in owner)


def _is_wished(groups: Groups, placement: str, wishes: Wishes) -> bool:
    if wishes.n_stages not in (None, len(groups)):
        return False
    wanted = wished_placement(wishes)
    once_around = wanted == "loop" and placement == "chain" and wishes.n_stages is not None
    return len(groups) == 1 or wanted in (None, placement) or once_around


def _with_chunks(chains: Sequence[Groups], wishes: Wishes, cluster: Cluster) -> list[Groups]:
    """List the ways to give several stages to each group of devices.

    Where the user fixed groups, or on many devices, only for a schedule that wants them.
    """
    wanted = wished_placement(wishes) in ("loop", "vee")
    if not wanted and (cluster.groups is not None or cluster.n_devices > FEW_DEVICES):
        return []
    found: dict[Groups, None] = {}
    for owners in chains:
        if len(owners) == 1 or len({len(group) for group in owners}) > 1:
            continue
        n_chunks, rest = divmod(wishes.n_stages or _CHUNKS * len(owners), len(owners))
        for placement in ("loop", "vee") if n_chunks == 2 else ("loop",):
            groups = placed(owners, placement, n_chunks)
            if n_chunks > 1 and not rest and _is_wished(groups, placement, wishes):
                found[groups] = None
    return list(found)


def _chains(cluster: Cluster, wishes: Wishes) -> list[Groups]:
    """List the ways to give every group of devices one stage."""
    n = cluster.n_devices
    ways: dict[Groups, None] = {}
    if not wishes.all_devices:
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
    """List the numbers of groups of devices to try: as many as stages, or fewer with several stages each.

    Raises:
        ConstraintError: stages are wished for that no devices can share equally.
    """
    if wishes.n_stages is not None:
        n = wishes.n_stages
        counts = [p for p in range(1, n_devices + 1) if p == n or (p > 1 and n % p == 0 and n > p)]
        if n < 1 or not counts:
            shared = ", or go equally many to each of 2 or more" if n_devices > 1 else ""
            raise ConstraintError(f"stages must be 1 to the number of devices, {n_devices}{shared}; got {n}")
        return counts
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
    n_replicas, n_workers = max(len(group) for group in groups), len(owners_of(groups))
    most = max(1, batch_rows // n_replicas)
    if n_workers > FEW_DEVICES or n_replicas > FEW_DEVICES:
        return sorted({most // rows for rows in _ROWS if most // rows >= 1})
    return sorted({min(most, n_workers * factor) for factor in _PIECES_PER_STAGE})


def rows_of(groups: Sequence[Sequence[int]], n_microbatches: int, batch_rows: int) -> int:
    """Return the rows of the largest microbatch."""
    n_replicas = max(len(group) for group in groups)
    return -(-batch_rows // min(batch_rows, n_microbatches * n_replicas))
