"""A lower bound on the step of every cut into given groups of devices, from the costs of ops alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .costs.op_cost import FREE
from .opgraph import carries_gradient
from .pricing import Priced


def least_step_s(priced: Priced, sizes: Sequence[int], n_pieces: int, *, in_chain: bool = True) -> float:
    """Bound the step of ``n_pieces`` microbatches on stages of so many replicas each from below, whatever the cut.

    Take any path through the ops on which every value carries a gradient, and let L_s be the seconds of its ops on
    stage s, forward and backward, and B_s those on the stages before s. A replica of stage s that has m_s microbatches
    starts its first forward after that microbatch's forwards on the path's earlier stages, computes m_s x L_s at least,
    and its last backward is followed by that microbatch's backwards on these stages. So the step T satisfies
    T >= B_s + m_s L_s for every s, hence T - B_{s+1} >= (T - B_s) (1 - 1/m_s), and after the last stage
    T - C >= T x prod(1 - 1/m_s), where C are the seconds of the path: T >= C / (1 - prod(1 - 1/m_s)). A stage without
    an op of the path only makes the product smaller. An op that several stages compute counts where the path takes it.

    All ops together give W = sum of L_s and T >= m_s L_s, hence T >= W / sum(1/m_s). The larger bound counts; where
    workers have several stages (``in_chain`` false, ``sizes`` are those of the workers' groups), only the second holds;
    recompute, wires, reductions, copies, the loss and shared cores only add to the step. O(ops + edges).
    """
    most = [-(-n_pieces // size) for size in sizes]  # microbatches of the busiest replica
    work_s, path_s = _seconds(priced)
    idle = math.prod(1 - 1 / m for m in most)
    shared_s = work_s / sum(1 / m for m in most)
    return (max(path_s / (1 - idle), shared_s) if in_chain else shared_s) * (1 - 1e-9)


def _seconds(priced: Priced) -> tuple[float, float]:
    """Return the seconds of all ops and of the longest path, each op on the kind of device that is fastest for it."""
    until: dict[str, float] = {}
    work_s = 0.0
    for name, op in priced.ops.items():  # in graph order, which is topological
        costs = [by_name.get(name, FREE) for by_name in priced.costs.values()]
        own_s = min(cost.forward_s + cost.backward_s for cost in costs)
        before = (until[i] for i in op.inputs if i in until and carries_gradient(priced.facts[i]))
        until[name] = own_s + max(before, default=0.0)
        work_s += own_s
    return work_s, max(until.values(), default=0.0)
