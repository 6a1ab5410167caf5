"""What a program does to the values of a step, by rules as strict as a transport's can be: the reference of its checks.

Every packet is a token that is made by one compute, carried by one send and one receive, and used up by one compute.
Workers block: a send until its receiver stands at a receive from it, a reduction until all replicas stand at it, a
forward or backward of a stage in lockstep until all replicas of the round do. Nothing here is taken from the checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagecut.runtime.instructions import WHOLE_BATCH, Instruction, Op
from stagecut.runtime.program import Program

TRAIN, FORWARD, BACKWARD = "train", "forward", "backward"
Packet = tuple[str, int, int, int]  # "act" or "grad", from stage, to stage, microbatch


class Harm(Exception):
    """The program would not do what a step is to do."""


def harm_of(
    program: Program,
    kind: str,
    in_lockstep: frozenset[int] = frozenset(),
    max_in_flight: tuple[int, ...] | None = None,
) -> str | None:
    """Run a program; say what goes wrong, or None where it does exactly what a step of its kind is to do."""
    try:
        _Run(program, kind, in_lockstep, max_in_flight).run()
    except Harm as harm:
        return str(harm)
    return None


@dataclass
class _Part:
    """One stage's share of one microbatch, on the worker that it belongs to."""

    came: set[Packet] = field(default_factory=set)
    left: set[Packet] = field(default_factory=set)  # made, not yet taken away
    ran: list[str] = field(default_factory=list)
    freed: bool = False


class _Run:
    def __init__(
        self, program: Program, kind: str, in_lockstep: frozenset[int], max_in_flight: tuple[int, ...] | None
    ) -> None:
        self.program, self.layout, self.kind = program, program.layout, kind
        self.in_lockstep, self.max_in_flight = in_lockstep, max_in_flight
        self.parts = {(s, m): _Part() for s in range(self.layout.n_stages) for m in range(program.n_microbatches)}
        self.at = [0] * len(program.workers)
        self.reduced: list[int] = []
        self.held = [0] * len(program.workers)

    def run(self) -> None:
        workers = range(len(self.at))
        while any(self.step(worker) for worker in workers):
            pass
        stuck = [str(self.head(worker)) for worker in workers if self.head(worker)]
        self.require(not stuck, f"nobody moves: {stuck}")
        wanted = {TRAIN: (["F", "B"], ["F", "I", "W"]), FORWARD: (["F"],), BACKWARD: (["B"], ["I", "W"])}[self.kind]
        for place, part in self.parts.items():
            self.require(part.ran in wanted, f"{part.ran} ran for {place}")
            self.require(part.freed and not part.came and not part.left, f"something of {place} stays")
        stages = [] if self.kind == FORWARD else list(range(self.layout.n_stages))
        self.require(sorted(self.reduced) == stages, f"reduced {self.reduced}")

    @staticmethod
    def require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise Harm(otherwise)

    def head(self, worker: int) -> Instruction | None:
        mine = self.program.workers[worker]
        return mine[self.at[worker]] if self.at[worker] < len(mine) else None

    def step(self, worker: int) -> bool:
        i = self.head(worker)
        if i is None:
            return False
        self.require(0 <= i.stage < self.layout.n_stages, f"{i}: no such stage")
        owners = self.layout.workers[i.stage]
        if i.op is Op.REDUCE:
            self.require(worker in owners, f"{i} on worker {worker}")
            heads = [self.head(owner) for owner in owners]
            if any(head is None or (head.op, head.stage) != (Op.REDUCE, i.stage) for head in heads):
                return False
            self.require(all(head.microbatch == WHOLE_BATCH for head in heads if head), f"{heads}")
            self.reduce(i.stage)
            return self.pass_on(owners)
        self.require((i.stage, i.microbatch) in self.parts, f"{i}: no such microbatch")
        self.require(owners[i.microbatch % len(owners)] == worker, f"{i} on worker {worker}")
        part = self.parts[i.stage, i.microbatch]
        self.require(not part.freed, f"{i}: after the release")
        if i.op is Op.FREE:
            self.require(bool(part.ran) and not part.came, f"{i}: what is released was never used")
            self.held[worker] -= "F" in part.ran
            part.freed = True
        elif i.op in (Op.SEND_ACT, Op.SEND_GRAD):
            return self.send(worker, i)
        elif i.op in (Op.RECV_ACT, Op.RECV_GRAD):
            return False  # its sender moves both
        elif i.stage in self.in_lockstep and i.op is not Op.BACKWARD_WEIGHT:
            return self.round(i)
        else:
            self.compute(worker, i)
        return self.pass_on((worker,))

    def pass_on(self, workers: tuple[int, ...]) -> bool:
        for worker in workers:
            self.at[worker] += 1
        return True

    def reduce(self, s: int) -> None:
        ends = [self.parts[s, m].ran[-1:] for m in range(self.program.n_microbatches)]
        self.require(all(end in (["B"], ["W"]) for end in ends), f"stage {s} is reduced before its last backward")
        self.reduced.append(s)

    def round(self, i: Instruction) -> bool:
        """Compute with all replicas of a round; a round that lacks some is another group, which goes by itself."""
        present = self.present(i)
        heads = [self.head(owner) for owner in present]
        if any(head is None or (head.op, head.stage) != (i.op, i.stage) for head in heads):
            return False
        here = [head for head in heads if head]
        for head in here:
            exists = 0 <= head.microbatch < self.program.n_microbatches
            if not exists or self.present(head).keys() != present.keys():
                return False
        for owner, head in zip(present, here):
            self.require(head.microbatch == present[owner], f"{i}: replicas are in different rounds")
            self.require(not self.parts[head.stage, head.microbatch].freed, f"{head}: after the release")
            self.compute(owner, head)
        return self.pass_on(tuple(present))

    def present(self, i: Instruction) -> dict[int, int]:
        """Return the replicas that have a microbatch in the round of an instruction, and which one."""
        owners = self.layout.workers[i.stage]
        first = i.microbatch - i.microbatch % len(owners)
        return dict(zip(owners, range(first, self.program.n_microbatches)))

    def compute(self, worker: int, i: Instruction) -> None:
        s, m, part, what = i.stage, i.microbatch, self.parts[i.stage, i.microbatch], i.op.value
        layout, before = self.layout, [] if self.kind == BACKWARD else ["F"]
        after = {"F": [], "B": before, "I": before, "W": [*before, "I"]}[what]
        self.require(part.ran == after, f"{i} after {part.ran}")
        part.ran.append(what)
        if what == "F":
            needed = {("act", a, s, m) for a, b in layout.wires if b == s}
            made = {("act", s, b, m) for a, b in layout.wires if a == s}
            self.held[worker] += 1
            fits = self.max_in_flight is None or self.held[worker] <= self.max_in_flight[worker]
            self.require(fits, f"{i}: one more than fits")
        elif what == "W":
            return
        else:
            needed = {("grad", b, s, m) for a, b in layout.gradient_wires if a == s}
            made = {("grad", s, a, m) for a, b in layout.gradient_wires if b == s}
        self.require(needed <= part.came, f"{i} lacks {needed - part.came}")
        part.came -= needed
        for packet in made:
            owners = layout.workers[packet[2]]
            to_own = owners[m % len(owners)] == worker
            (self.parts[packet[2], m].came if to_own else part.left).add(packet)

    def send(self, worker: int, i: Instruction) -> bool:
        other = self.head(i.peer_worker) if 0 <= i.peer_worker < len(self.at) else None
        if other is None or other.op not in (Op.RECV_ACT, Op.RECV_GRAD) or other.peer_worker != worker:
            return False
        sent = ("act" if i.op is Op.SEND_ACT else "grad", i.stage, i.peer_stage, i.microbatch)
        met = ("act" if other.op is Op.RECV_ACT else "grad", other.peer_stage, other.stage, other.microbatch)
        self.require(sent == met, f"{i} meets {other}")
        owners = self.layout.workers[other.stage]
        self.require(owners[i.microbatch % len(owners)] == i.peer_worker, f"{other} on worker {i.peer_worker}")
        target = self.parts[other.stage, other.microbatch]
        self.require(sent in self.parts[i.stage, i.microbatch].left, f"{i}: not there to be sent")
        self.require(not target.freed, f"{other}: after the release")
        self.parts[i.stage, i.microbatch].left.remove(sent)
        target.came.add(sent)
        return self.pass_on((worker, i.peer_worker))
