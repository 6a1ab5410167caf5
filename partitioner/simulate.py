"""The simulator: a program and its costs give a timeline."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import PlanError
from ..runtime.instructions import (
    COMPUTE,
    INPUT_GRADIENTS,
    RECEIVES,
    SENDS,
    WEIGHT_GRADIENTS,
    WHOLE_BATCH,
    Instruction,
    Op,
)
from ..runtime.program import Program, Span, Timeline
from .cluster import Link

Packet = tuple[bool, int, int, int]  # is a gradient, from stage, to stage, microbatch


@dataclass(frozen=True)
class StepCosts:
    """Seconds of everything in a step.

    Attributes:
        forward_s, backward_s: per stage, for one microbatch.
        backward_input_s, backward_weight_s: per stage, the parts of a backward where programs run them apart.
        packet_bytes: per pair of stages, bytes of one activation packet.
        gradient_bytes: per pair of stages, bytes of one gradient packet; None if as many as there.
        link: what a packet costs on its way; ``links`` has the pairs of stages for which that differs.
        action_overhead_s: per compute instruction, the runtime's own work.
        send_overhead_s, pack_bytes_per_s: what sending keeps the sender busy for, and how fast it packs.
        reduce_s: per stage, the reduction of its gradients over its replicas, all together.
        reduce_buckets: per stage, the parts in which it goes, each as soon as the last backward has made its gradients
            (DistributedDataParallel's buckets); () for one, after the backward.
        store_s, accumulate_s: per stage, by how much a worker's first backward and its later ones are longer; () for
            nothing.
        optimizer_s: per stage, the optimizer's step, which a worker does for all its stages when it is through; () for
            none.
        hosts: per worker, the machine that it runs on; () for one each.
        n_cores: workers that a machine can run at once; None for all. Where more are busy they share in equal parts,
            and all take ``sharing`` times as long; with fewer, and more than one, ``beside`` times as long.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    packet_bytes: Mapping[tuple[int, int], float]
    link: Link
    action_overhead_s: float = 0.0
    send_overhead_s: float = 0.0
    pack_bytes_per_s: float = float("inf")
    reduce_s: tuple[float, ...] = ()
    reduce_buckets: tuple[int, ...] = ()
    store_s: tuple[float, ...] = ()
    accumulate_s: tuple[float, ...] = ()
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    hosts: tuple[int, ...] = ()
    n_cores: int | None = None
    beside: float = 1.0
    sharing: float = 1.0
    gradient_bytes: Mapping[tuple[int, int], float] | None = None
    backward_input_s: tuple[float, ...] = ()
    backward_weight_s: tuple[float, ...] = ()
    optimizer_s: tuple[float, ...] = ()


def simulate(program: Program, costs: StepCosts) -> Timeline:
    """Run ``program`` on a clock.

    Workers run their instructions in order. A compute waits for the packets that it needs; sending occupies the
    sender for packing and travels beside later compute (packing as slow as the link is a transfer that hides nothing);
    packets from one worker to another go one behind the other; a reduction is complete once the last replica has
    reached it and what of it no backward hid is over.
    Time O(instructions x log workers).

    Raises:
        PlanError: the program waits for something that never comes.
    """
    return _Simulation(program, costs).run()


class _Host:
    """A machine whose busy workers share its cores in equal parts.

    ``progress`` counts the seconds of work that each busy worker has been given; a task of so many seconds ends when
    ``progress`` has grown by them, whoever came and went meanwhile.
    """

    def __init__(self, n_cores: int | None, beside: float, sharing: float) -> None:
        self.n_cores = n_cores
        self.beside = beside
        self.sharing = sharing
        self.progress = 0.0
        self.now = 0.0
        self.ends: list[tuple[float, int]] = []  # progress at which a worker's task ends

    def advance(self, now: float) -> None:
        self.progress += (now - self.now) * self._rate()
        self.now = now

    def _rate(self) -> float:
        busy = len(self.ends)
        if self.n_cores is None or busy <= 1:
            return 1.0
        return 1.0 / self.beside if busy <= self.n_cores else self.n_cores / (busy * self.sharing)

    def next_end_s(self) -> float:
        """Say when the first task ends if nobody comes or goes before."""
        if not self.ends:
            return float("inf")
        return self.now + max(0.0, self.ends[0][0] - self.progress) / self._rate()


class _Simulation:
    def __init__(self, program: Program, costs: StepCosts) -> None:
        self.program, self.costs, self.layout = program, costs, program.layout
        n_workers = len(program.workers)
        self.at = [0] * n_workers
        self.started_s: list[float | None] = [None] * n_workers  # of a task that runs
        # With all the cores that they want, workers do not meet: one clock serves them all.
        names = (costs.hosts or tuple(range(n_workers))) if costs.n_cores is not None else (0,) * n_workers
        self.hosts = {name: _Host(costs.n_cores, costs.beside, costs.sharing) for name in names}
        self.host_of = [self.hosts[name] for name in names]
        stages = range(self.layout.n_stages)
        self.givers = {(False, s): self.layout.producers(s) for s in stages}  # of a stage's packets
        self.givers |= {(True, s): self.layout.consumers(s, gradients=True) for s in stages}
        self.arrival: dict[Packet, float] = {}
        self.done: set[tuple[bool, int, int]] = set()  # is a gradient, stage, microbatch
        self.reached: dict[int, set[int]] = {}
        self.has_gradients: set[tuple[int, int]] = set()  # worker, stage
        self.last_backward_s: dict[tuple[int, int], float] = {}  # worker, stage
        self.link_free_s: dict[tuple[int, int], float] = {}  # from worker, to worker
        self.wakes: list[tuple[float, int]] = []
        self.spans: list[Span] = []

    def run(self) -> Timeline:
        for worker in range(len(self.at)):
            self._proceed(worker, 0.0)
        hosts = list(self.hosts.values())
        while True:
            host = min(hosts, key=_Host.next_end_s) if len(hosts) > 1 else hosts[0]
            end = host.next_end_s()
            if self.wakes and self.wakes[0][0] <= end:
                now, worker = heapq.heappop(self.wakes)
                self._proceed(worker, now)
            elif end < float("inf"):
                host.advance(end)
                _, worker = heapq.heappop(host.ends)
                self._complete(worker, end)
            else:
                break
        for worker, instructions in enumerate(self.program.workers):
            if self.at[worker] < len(instructions):
                raise PlanError(f"worker {worker} waits for ever at {instructions[self.at[worker]]}")
        if self.costs.optimizer_s:
            self.spans += self._optimizer_steps(self.costs.optimizer_s)
        spans = sorted(self.spans, key=lambda span: (span.worker, span.start_s, span.end_s))
        return Timeline("simulated", len(self.program.workers), tuple(spans))

    def _optimizer_steps(self, optimizer_s: tuple[float, ...]) -> list[Span]:
        through = [0.0] * len(self.at)
        for span in self.spans:
            through[span.worker] = max(through[span.worker], span.end_s)
        own = [[s for s, owners in enumerate(self.layout.workers) if w in owners] for w in range(len(self.at))]
        return [
            Span(worker, "optimizer", stages[0], WHOLE_BATCH, end, end + sum(optimizer_s[s] for s in stages))
            for worker, (end, stages) in enumerate(zip(through, own))
        ]

    def _proceed(self, worker: int, now: float) -> None:
        """Start what the worker can start; instructions that take no time are passed over."""
        instructions = self.program.workers[worker]
        while self.started_s[worker] is None and self.at[worker] < len(instructions):
            i = instructions[self.at[worker]]
            if i.op is Op.REDUCE:
                self._reach(worker, i, now)
                return
            if i.op in COMPUTE and not self._has_inputs(worker, i, now):
                return
            if i.op in COMPUTE or i.op in SENDS:
                self._start(worker, self._seconds(worker, i), now)
            else:
                assert i.op in RECEIVES or i.op is Op.FREE
                self.at[worker] += 1

    def _seconds(self, worker: int, i: Instruction) -> float:
        costs = self.costs
        if i.op in SENDS:
            return costs.send_overhead_s + self._bytes(i) / costs.pack_bytes_per_s
        if i.op is Op.FORWARD:
            return costs.forward_s[i.stage] + costs.action_overhead_s
        if i.op is Op.BACKWARD_INPUT:
            return costs.backward_input_s[i.stage] + costs.action_overhead_s
        own_s = costs.backward_s if i.op is Op.BACKWARD else costs.backward_weight_s
        more_s = costs.accumulate_s if (worker, i.stage) in self.has_gradients else costs.store_s
        self.has_gradients.add((worker, i.stage))
        return own_s[i.stage] + (more_s[i.stage] if more_s else 0.0) + costs.action_overhead_s

    def _bytes(self, i: Instruction) -> float:
        back = self.costs.gradient_bytes if i.op is Op.SEND_GRAD else None
        sizes = self.costs.packet_bytes if back is None else back
        return sizes.get(self._pair(i), 0.0)

    @staticmethod
    def _pair(i: Instruction) -> tuple[int, int]:
        return (i.peer_stage, i.stage) if i.op is Op.SEND_GRAD else (i.stage, i.peer_stage)

    def _start(self, worker: int, seconds: float, now: float) -> None:
        host = self.host_of[worker]
        host.advance(now)
        self.started_s[worker] = now
        heapq.heappush(host.ends, (host.progress + seconds, worker))

    def _complete(self, worker: int, now: float) -> None:
        start, self.started_s[worker] = self.started_s[worker], None
        assert start is not None
        i = self.program.workers[worker][self.at[worker]]
        self.at[worker] += 1
        if now > start or i.op in COMPUTE:  # a backward of no time still waits for its packets
            self.spans.append(Span(worker, i.op.value, i.stage, i.microbatch, start, now))
        if i.op in WEIGHT_GRADIENTS:
            self.last_backward_s[worker, i.stage] = now - start
        if i.op in COMPUTE:
            if i.op is not Op.BACKWARD_WEIGHT:
                self.done.add((i.op in INPUT_GRADIENTS, i.stage, i.microbatch))
        elif i.op in SENDS:
            link = self.costs.links.get(self._pair(i), self.costs.link)
            packet = (i.op is Op.SEND_GRAD, i.stage, i.peer_stage, i.microbatch)
            ends = (worker, i.peer_worker)
            self.link_free_s[ends] = max(now, self.link_free_s.get(ends, 0.0)) + self._bytes(i) / link.bytes_per_s
            self.arrival[packet] = self.link_free_s[ends] + link.latency_s
            heapq.heappush(self.wakes, (self.arrival[packet], i.peer_worker))
        self._proceed(worker, now)

    def _has_inputs(self, worker: int, i: Instruction, now: float) -> bool:
        return all(known is not None and known <= now for known in self._inputs_at(worker, i))

    def _inputs_at(self, worker: int, i: Instruction) -> Iterator[float | None]:
        if i.op is Op.BACKWARD_WEIGHT:
            return
        s, m, backward = i.stage, i.microbatch, i.op in INPUT_GRADIENTS
        for peer in self.givers[backward, s]:
            if self.layout.worker_of(peer, m) == worker:
                yield 0.0 if (backward, peer, m) in self.done else None
            else:
                yield self.arrival.get((backward, peer, s, m))

    def _reach(self, worker: int, i: Instruction, now: float) -> None:
        """Join a reduction; the last replica to come starts it for all."""
        reached = self.reached.setdefault(i.stage, set())
        reached.add(worker)
        owners = self.layout.workers[i.stage]
        if len(reached) < len(owners):
            return
        seconds = self._left_of_reduction_s(i.stage, self.last_backward_s.get((worker, i.stage), 0.0))
        for owner in owners:
            self._start(owner, seconds, now)

    def _left_of_reduction_s(self, stage: int, backward_s: float) -> float:
        """Return what is left of a reduction after the backward beside which its buckets went.

        Of n equal buckets the i-th is ready after i / n of the backward, and they go one behind the other.
        """
        whole_s = self.costs.reduce_s[stage] if self.costs.reduce_s else 0.0
        n = self.costs.reduce_buckets[stage] if self.costs.reduce_buckets else 1
        return max(whole_s / n, whole_s - backward_s * (n - 1) / n)
