"""Lowering: the compute order per worker becomes instructions with sends, receives, frees and reductions.

Every transfer and reduction gets a place in one global order that respects all dependencies, and each worker lists its
own instructions in that order. So even if a send blocks until its receive is posted, on one in-order channel per pair
of workers, and a reduction until all replicas have reached it, the earliest unfinished one can always proceed: no
deadlock.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from ...errors import ConstraintError
from ..instructions import WHOLE_BATCH, Action, Instruction, Layout, Op

_UNIT_TIME = {"F": 1, "B": 2, "I": 1, "W": 1}


@dataclass(frozen=True)
class Program:
    """The instructions of every worker for one step.

    Attributes:
        name: the schedule that it was lowered from.
        layout: stages, workers and wires.
        n_microbatches: pieces of the whole batch, over all replicas.
        workers: per worker, its instructions in order.
    """

    name: str
    layout: Layout
    n_microbatches: int
    workers: tuple[tuple[Instruction, ...], ...]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.layout.n_stages} stages, {self.n_microbatches} microbatches"]
        for worker, instructions in enumerate(self.workers):
            lines += [f"worker {worker}:"] + [f"  {instruction}" for instruction in instructions]
        return "\n".join(lines)


def lower(
    name: str,
    layout: Layout,
    orders: tuple[tuple[Action, ...], ...],
    n_microbatches: int,
    in_lockstep: frozenset[int] = frozenset(),
) -> Program:
    """Lower compute orders to a program.

    ``orders`` may hold forwards and backwards, forwards only, or backwards only (activations held from before); a
    backward may be in one or in its two parts.
    Receives are listed where, at unit times, their send happens; a transport that matches messages may post earlier.
    ``in_lockstep`` are the stages whose replicas wait for each other inside of the forward and the backward of a round.

    Raises:
        ConstraintError: the orders wait for each other in a circle, so that no order of execution exists.
    """
    return Program(name, layout, n_microbatches, _Lowering(layout, orders, n_microbatches, in_lockstep).run())


class _Lowering:
    def __init__(
        self,
        layout: Layout,
        orders: tuple[tuple[Action, ...], ...],
        n_microbatches: int,
        in_lockstep: frozenset[int],
    ) -> None:
        self.layout = layout
        self.n_microbatches = n_microbatches
        self.in_lockstep = in_lockstep
        self.orders = orders
        self.has_forwards = any(action.kind == "F" for order in orders for action in order)
        split = {(a.stage, a.microbatch) for order in orders for a in order if a.kind == "I"}
        self.back_of = {(s, m): "I" if (s, m) in split else "B" for s in range(layout.n_stages)
                        for m in range(n_microbatches)}  # fmt: skip
        self.has_backwards = any(action.kind != "F" for order in orders for action in order)
        self.end_of: dict[Action, int] = {}
        self.programs: list[list[Instruction]] = [[] for _ in range(layout.n_workers)]
        self.backwards_left = [n_microbatches] * layout.n_stages

    def run(self) -> tuple[tuple[Instruction, ...], ...]:
        position = [0] * len(self.orders)
        free_at = [0] * len(self.orders)
        ready: list[tuple[int, tuple[int, ...]]] = []  # when the next action of workers starts, and the workers
        arrived: dict[tuple[str, int, int], list[int]] = {}  # at the action of a round that replicas do together
        waiting: dict[Action, set[int]] = {}  # workers whose next action needs an action that has no end yet

        def look_at(worker: int) -> None:
            if position[worker] == len(self.orders[worker]):
                return
            needed = self._dependencies(self.orders[worker][position[worker]])
            missing = next((action for action in needed if action not in self.end_of), None)
            if missing is not None:
                waiting.setdefault(missing, set()).add(worker)
                return
            party = self._party(self.orders[worker][position[worker]], worker, arrived)
            if party:
                needed = [a for w in party for a in self._dependencies(self.orders[w][position[w]])]
                start = max((self.end_of[action] for action in needed), default=0)
                heapq.heappush(ready, (max(start, *(free_at[w] for w in party)), party))

        for worker in range(len(self.orders)):
            look_at(worker)
        while ready:
            start, party = heapq.heappop(ready)
            actions = {worker: self.orders[worker][position[worker]] for worker in party}
            for worker, action in actions.items():
                free_at[worker] = self.end_of[action] = start + _UNIT_TIME[action.kind]
                position[worker] += 1
                self.programs[worker].append(Instruction(Op(action.kind), action.stage, action.microbatch))
            for worker, action in actions.items():
                self._follow(worker, action)
            woken = (waiting.pop(action, set()) for action in actions.values())
            for other in sorted({*party}.union(*woken)):
                look_at(other)
        stuck = [f"worker {w} at {order[at]}" for w, (order, at) in enumerate(zip(self.orders, position))
                 if at < len(order)]  # fmt: skip
        if stuck:
            raise ConstraintError(f"the schedule waits for itself: {', '.join(stuck)}")
        return tuple(tuple(program) for program in self.programs)

    def _party(self, action: Action, worker: int, arrived: dict[tuple[str, int, int], list[int]]) -> tuple[int, ...]:
        """Return the workers that do an action together, once all of them have come to it."""
        s, m = action.stage, action.microbatch
        if s not in self.in_lockstep or action.kind == "W":
            return (worker,)
        owners = self.layout.workers[s]
        here = arrived.setdefault((action.kind, s, self.layout.round_of(s, m)), [])
        here.append(worker)
        n_present = min(len(owners), self.n_microbatches - (m - m % len(owners)))
        return tuple(sorted(here)) if len(here) == n_present else ()

    def _dependencies(self, action: Action) -> list[Action]:
        s, m = action.stage, action.microbatch
        if action.kind == "F":
            return [Action("F", producer, m) for producer in self.layout.producers(s)]
        if action.kind == "W":
            return [Action("I", s, m)]
        own = [Action("F", s, m)] if self.has_forwards else []
        consumers = self.layout.consumers(s, gradients=True)
        return own + [Action(self.back_of[consumer, m], consumer, m) for consumer in consumers]

    def _follow(self, worker: int, action: Action) -> None:
        """List what follows from an action: transfers, frees, reductions."""
        s, m = action.stage, action.microbatch
        own = self.programs[worker]
        if action.kind == "F":
            self._transfer(worker, s, m, self.layout.consumers(s), Op.SEND_ACT, Op.RECV_ACT)
            if not self.has_backwards:
                own.append(Instruction(Op.FREE, s, m))
            return
        if action.kind in "BI":
            self._transfer(worker, s, m, self.layout.producers(s, gradients=True), Op.SEND_GRAD, Op.RECV_GRAD)
        if action.kind == "I":
            return
        own.append(Instruction(Op.FREE, s, m))
        self.backwards_left[s] -= 1
        if self.backwards_left[s] == 0:
            # One place in the global order for all replicas, those that were given no microbatch included.
            for owner in self.layout.workers[s]:
                self.programs[owner].append(Instruction(Op.REDUCE, s, WHOLE_BATCH))

    def _transfer(self, worker: int, s: int, m: int, peers: tuple[int, ...], send: Op, receive: Op) -> None:
        for peer in peers:
            other = self.layout.worker_of(peer, m)
            if other != worker:
                self.programs[worker].append(Instruction(send, s, m, peer, other))
                self.programs[other].append(Instruction(receive, peer, m, s, worker))
