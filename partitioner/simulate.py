"""The simulator: a program and its costs give a timeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PlanError
from ..runtime.instructions import COMPUTE, RECEIVES, SENDS, Instruction, Op
from ..runtime.program import Program, Span, Timeline
from .cluster import Link


@dataclass(frozen=True)
class StepCosts:
    """Seconds of everything in a step.

    Attributes:
        forward_s, backward_s: per stage, for one microbatch.
        packet_bytes: per pair of stages, bytes of one activation packet; a gradient packet has as many.
        link: what a packet costs on its way.
        action_overhead_s: per compute instruction, the runtime's own work.
        send_overhead_s, pack_bytes_per_s: what sending keeps the sender busy for, and how fast it packs.
        reduce_s: per stage, the part of the gradient reduction that no backward hides.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    packet_bytes: Mapping[tuple[int, int], float]
    link: Link
    action_overhead_s: float = 0.0
    send_overhead_s: float = 0.0
    pack_bytes_per_s: float = float("inf")
    reduce_s: tuple[float, ...] = ()


def simulate(program: Program, costs: StepCosts) -> Timeline:
    """Run ``program`` on a clock.

    Workers run their instructions in order. A compute waits for the packets that it needs; sending occupies the
    sender for packing and travels beside later compute; a reduction starts when the last replica has reached it.
    Linear in the number of instructions.

    Raises:
        PlanError: the program waits for something that never comes.
    """
    return _Simulation(program, costs).run()


class _Simulation:
    def __init__(self, program: Program, costs: StepCosts) -> None:
        self.program = program
        self.costs = costs
        self.clock = [0.0] * len(program.workers)
        self.at = [0] * len(program.workers)
        self.arrival: dict[tuple[bool, int, int, int], float] = {}
        self.done: dict[tuple[Op, int, int], float] = {}
        self.reached: dict[int, dict[int, float]] = {}
        self.spans: list[Span] = []

    def run(self) -> Timeline:
        moved = True
        while moved:
            moved = False
            for worker, instructions in enumerate(self.program.workers):
                while self.at[worker] < len(instructions) and self._step(worker, instructions[self.at[worker]]):
                    self.at[worker] += 1
                    moved = True
        for worker, instructions in enumerate(self.program.workers):
            if self.at[worker] < len(instructions):
                raise PlanError(f"worker {worker} waits for ever at {instructions[self.at[worker]]}")
        spans = sorted(self.spans, key=lambda span: (span.worker, span.start_s, span.end_s))
        return Timeline("simulated", len(self.program.workers), tuple(spans))

    def _step(self, worker: int, i: Instruction) -> bool:
        """Run ``i`` if what it needs has a known time; say whether it ran."""
        if i.op in COMPUTE:
            ready = self._inputs_at(worker, i)
            if ready is None:
                return False
            seconds = self.costs.forward_s if i.op is Op.FORWARD else self.costs.backward_s
            self._span(worker, i, max(self.clock[worker], ready), seconds[i.stage] + self.costs.action_overhead_s)
            self.done[i.op, i.stage, i.microbatch] = self.clock[worker]
        elif i.op in SENDS:
            gradient = i.op is Op.SEND_GRAD
            pair = (i.peer_stage, i.stage) if gradient else (i.stage, i.peer_stage)
            n_bytes = self.costs.packet_bytes.get(pair, 0.0)
            busy = self.costs.send_overhead_s + n_bytes / self.costs.pack_bytes_per_s
            self._span(worker, i, self.clock[worker], busy)
            arrival = self.clock[worker] + self.costs.link.seconds(n_bytes)
            self.arrival[gradient, i.stage, i.peer_stage, i.microbatch] = arrival
        elif i.op is Op.REDUCE:
            return self._reduce(worker, i)
        else:
            assert i.op in RECEIVES or i.op is Op.FREE
        return True

    def _span(self, worker: int, i: Instruction, start: float, seconds: float) -> None:
        self.clock[worker] = start + seconds
        if seconds > 0:
            self.spans.append(Span(worker, i.op.value, i.stage, i.microbatch, start, start + seconds))

    def _inputs_at(self, worker: int, i: Instruction) -> float | None:
        layout, s, m = self.program.layout, i.stage, i.microbatch
        backward = i.op is Op.BACKWARD
        peers = layout.consumers(s, gradients=True) if backward else layout.producers(s)
        latest = 0.0
        for peer in peers:
            if layout.worker_of(peer, m) == worker:
                known = self.done.get((i.op, peer, m))
            else:
                known = self.arrival.get((backward, peer, s, m))
            if known is None:
                return None
            latest = max(latest, known)
        return latest

    def _reduce(self, worker: int, i: Instruction) -> bool:
        reached = self.reached.setdefault(i.stage, {})
        reached.setdefault(worker, self.clock[worker])
        owners = self.program.layout.workers[i.stage]
        if len(reached) < len(owners):
            return False
        seconds = self.costs.reduce_s[i.stage] if self.costs.reduce_s else 0.0
        self._span(worker, i, max(reached.values()) if len(owners) > 1 else self.clock[worker], seconds)
        return True
