"""The checks that every program passes before its first step."""

from __future__ import annotations

from collections import Counter

from ...errors import PlanError
from ..instructions import (
    COMPUTE,
    INPUT_GRADIENTS,
    RECEIVES,
    SENDS,
    WEIGHT_GRADIENTS,
    WHOLE_BATCH,
    Instruction,
    Op,
)
from .lower import Program

Message = tuple[Op, int, int, int]
_SENT_AS = {
    Op.SEND_ACT: Op.SEND_ACT,
    Op.RECV_ACT: Op.SEND_ACT,
    Op.SEND_GRAD: Op.SEND_GRAD,
    Op.RECV_GRAD: Op.SEND_GRAD,
}


_FORWARD = frozenset({Op.FORWARD})
_COUPLED = _FORWARD | INPUT_GRADIENTS  # where replicas wait for each other's statistics


def check(
    program: Program,
    *,
    computes: frozenset[Op] | None = None,
    max_in_flight: tuple[int, ...] | None = None,
    in_lockstep: frozenset[int] = frozenset(),
) -> None:
    """Prove that ``program`` runs every microbatch once everywhere, uses only what is there, and cannot deadlock.

    ``computes`` is what it is for: ``FORWARD``, ``BACKWARD`` (whole or in parts) or both; None takes it from what is
    there, and then cannot tell a step that has lost all its backwards from an evaluation. ``max_in_flight`` bounds,
    per worker, the microbatches held at once. ``in_lockstep`` are the stages whose replicas wait for each other inside
    of forwards and backwards: for those of the same round, which are as many consecutive microbatches as there are
    replicas.

    The deadlock check runs the program under the strictest rule: a send blocks until the peer reaches the matching
    receive, each ordered pair of workers has one channel that delivers in order (NCCL's rule), and a reduction blocks
    until every replica of its stage reaches it. Linear in the number of instructions.

    Raises:
        PlanError: naming the worker, the position and the instruction that breaks a rule.
    """
    found = {i.op for instructions in program.workers for i in instructions} & COMPUTE
    forwards = Op.FORWARD in (found if computes is None else computes)
    backwards = bool(found - _FORWARD if computes is None else computes - _FORWARD)
    _check_owned(program, forwards, backwards)
    _check_complete(program, forwards, backwards)
    for worker in range(len(program.workers)):
        _check_values(program, worker, not forwards, None if max_in_flight is None else max_in_flight[worker])
    _check_rendezvous(program, in_lockstep)


def _refuse(program: Program, worker: int, position: int, why: str) -> None:
    instruction = program.workers[worker][position]
    raise PlanError(f"program {program.name!r}, worker {worker}, instruction {position}, {instruction}: {why}")


def _check_owned(program: Program, forwards: bool, backwards: bool) -> None:
    """Check that every worker only does what is there to be done by it, and nothing twice."""
    for worker, instructions in enumerate(program.workers):
        count = Counter((i.op, i.stage, i.microbatch) for i in instructions if i.op not in SENDS | RECEIVES)
        for position, i in enumerate(instructions):
            if not _owns(program, worker, i):
                _refuse(program, worker, position, "this worker does not own that stage and microbatch")
            if i.op is not Op.FREE and count[i.op, i.stage, i.microbatch] > 1:
                _refuse(program, worker, position, "runs more than once")
            if not forwards and i.op in _FORWARD:
                _refuse(program, worker, position, "there are only backwards to do")
            if not backwards and (i.op in COMPUTE - _FORWARD or i.op is Op.REDUCE):
                _refuse(program, worker, position, "there are only forwards to do")


def _owns(program: Program, worker: int, i: Instruction) -> bool:
    layout = program.layout
    if not 0 <= i.stage < layout.n_stages:
        return False
    if i.op is Op.REDUCE:
        return i.microbatch == WHOLE_BATCH and worker in layout.workers[i.stage]
    return 0 <= i.microbatch < program.n_microbatches and layout.worker_of(i.stage, i.microbatch) == worker


def _check_complete(program: Program, forwards: bool, backwards: bool) -> None:
    layout = program.layout
    done = {(i.op, i.stage, i.microbatch) for instructions in program.workers for i in instructions}
    ops = {op for op, _, _ in done}
    whole = Op.BACKWARD in ops or not ops & {Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT}
    for s in range(layout.n_stages):
        for m in range(program.n_microbatches):
            mine = {op for op in COMPUTE if (op, s, m) in done}
            missing = Op.FORWARD if forwards and Op.FORWARD not in mine else None
            missing = missing or (_missing_backward(mine - _FORWARD, whole) if backwards else None)
            if missing:
                raise PlanError(f"program {program.name!r}: {Instruction(missing, s, m)} is missing")
    for s, owners in enumerate(layout.workers):
        for worker in owners:
            reduce = Instruction(Op.REDUCE, s, WHOLE_BATCH)
            if backwards and not any((i.op, i.stage) == (Op.REDUCE, s) for i in program.workers[worker]):
                why = f"stage {s} never completes its gradients: {reduce} is missing"
                raise PlanError(f"program {program.name!r}, worker {worker}: {why}")


def _missing_backward(mine: set[Op], whole: bool) -> Op | None:
    """Say what a stage lacks of a microbatch's backward, in a program that has whole ones or only parts."""
    if Op.BACKWARD in mine:
        return None
    if whole and not mine:
        return Op.BACKWARD
    return next((op for op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT) if op not in mine), None)


class _Held:
    """What one worker has at a point of its program."""

    def __init__(self, program: Program, worker: int, starts_with_activations: bool) -> None:
        self.layout = program.layout
        self.worker = worker
        self.starts_with_activations = starts_with_activations
        self.transferred: set[tuple[Op, int, int, int]] = set()
        self.done: set[tuple[Op, int, int]] = set()
        self.freed: set[tuple[int, int]] = set()

    def missing(self, i: Instruction) -> str | None:
        """Say what instruction ``i`` needs and does not have, or None."""
        s, m = i.stage, i.microbatch
        if i.op is not Op.REDUCE and (s, m) in self.freed:
            return "uses what was freed before"
        if i.op is Op.FORWARD:
            return self._missing_inputs(Op.RECV_ACT, _FORWARD, s, m, self.layout.producers(s))
        if i.op in INPUT_GRADIENTS:
            if not self.starts_with_activations and (Op.FORWARD, s, m) not in self.done:
                return "its forward has not run"
            if self._ran(INPUT_GRADIENTS, s, m):
                return "the gradients of its inputs were computed before"
            return self._missing_inputs(Op.RECV_GRAD, INPUT_GRADIENTS, s, m, self.layout.consumers(s, gradients=True))
        if i.op is Op.BACKWARD_WEIGHT:
            return None if (Op.BACKWARD_INPUT, s, m) in self.done else "its input gradient has not run"
        if i.op in SENDS | RECEIVES:
            strange = self._strange_transfer(i)
            if strange:
                return strange
        if i.op in SENDS:
            source = _FORWARD if i.op is Op.SEND_ACT else INPUT_GRADIENTS
            return None if self._ran(source, s, m) else "sends what has not been computed"
        return None

    def _strange_transfer(self, i: Instruction) -> str | None:
        """Say why a transfer is none of those that the layout asks for, each once, or None."""
        sends, gradients = i.op in SENDS, i.op in (Op.SEND_GRAD, Op.RECV_GRAD)
        to_consumer = sends is not gradients
        peers = (self.layout.consumers if to_consumer else self.layout.producers)(i.stage, gradients=gradients)
        if i.peer_stage not in peers:
            return f"no wire carries that from stage {i.stage if sends else i.peer_stage}"
        owner = self.layout.worker_of(i.peer_stage, i.microbatch)
        if i.peer_worker != owner or owner == self.worker:
            return f"worker {owner} owns the other end"
        if (i.op, i.stage, i.microbatch, i.peer_stage) in self.transferred:
            return "moves the same packet again"
        return None

    def _ran(self, ops: frozenset[Op], s: int, m: int) -> bool:
        return any((op, s, m) in self.done for op in ops)

    def _missing_inputs(
        self, receive: Op, computes: frozenset[Op], s: int, m: int, peers: tuple[int, ...]
    ) -> str | None:
        for peer in peers:
            local = self.layout.worker_of(peer, m) == self.worker
            here = self._ran(computes, peer, m) if local else (receive, s, m, peer) in self.transferred
            if not here:
                return f"needs the packet of stage {peer}, which is not there"
        return None

    def apply(self, i: Instruction) -> None:
        """Take the effect of ``i`` into account."""
        if i.op in COMPUTE:
            self.done.add((i.op, i.stage, i.microbatch))
        elif i.op in SENDS | RECEIVES:
            self.transferred.add((i.op, i.stage, i.microbatch, i.peer_stage))
        elif i.op is Op.FREE:
            self.freed.add((i.stage, i.microbatch))


def _check_values(program: Program, worker: int, starts_with_activations: bool, max_in_flight: int | None) -> None:
    held = _Held(program, worker, starts_with_activations)
    alive: set[tuple[int, int]] = set()
    for position, i in enumerate(program.workers[worker]):
        missing = held.missing(i)
        if missing:
            _refuse(program, worker, position, missing)
        held.apply(i)
        if i.op is Op.FORWARD:
            alive.add((i.stage, i.microbatch))
            if max_in_flight is not None and len(alive) > max_in_flight:
                _refuse(program, worker, position, f"holds {len(alive)} microbatches where {max_in_flight} fit")
        elif i.op is Op.FREE:
            alive.discard((i.stage, i.microbatch))
    ran = {(i.stage, i.microbatch) for i in program.workers[worker] if i.op in COMPUTE}
    for s, m in sorted(ran - held.freed):
        why = f"stage {s}, microbatch {m} is never freed: {Instruction(Op.FREE, s, m)} is missing"
        raise PlanError(f"program {program.name!r}, worker {worker}: {why}")
    _check_reduced_last(program, worker)


def _check_reduced_last(program: Program, worker: int) -> None:
    reduced: set[int] = set()
    for position, i in enumerate(program.workers[worker]):
        if i.op is Op.REDUCE:
            reduced.add(i.stage)
        elif i.op in WEIGHT_GRADIENTS and i.stage in reduced:
            _refuse(program, worker, position, "runs after the gradients of its stage were reduced")


def message_of(i: Instruction) -> Message:
    """Name the message that a send or a receive is about: kind, sending stage, receiving stage, microbatch."""
    sends = i.op in SENDS
    origin, target = (i.stage, i.peer_stage) if sends else (i.peer_stage, i.stage)
    return (_SENT_AS[i.op], origin, target, i.microbatch)


def _check_rendezvous(program: Program, in_lockstep: frozenset[int]) -> None:
    """Run the transfers and reductions with blocking semantics; whoever cannot move at the end is in a deadlock."""

    def waits_for_others(i: Instruction) -> bool:
        return i.op in SENDS | RECEIVES or i.op is Op.REDUCE or (i.op in _COUPLED and i.stage in in_lockstep)

    waits = [
        [(position, i) for position, i in enumerate(instructions) if waits_for_others(i)]
        for instructions in program.workers
    ]
    at = [0] * len(waits)
    moved = True
    while moved:
        moved = False
        for worker, mine in enumerate(waits):
            while at[worker] < len(mine):
                position, i = mine[at[worker]]
                party = _party(program, worker, i)
                if any(at[w] == len(waits[w]) for w in party):
                    break
                heads = [waits[w][at[w]][1] for w in party]
                if i.op not in SENDS | RECEIVES:
                    if any((head.op, head.stage) != (i.op, i.stage) for head in heads):
                        break
                    if any(_party(program, w, head) != party for w, head in zip(party, heads)):
                        break  # the last round, which lacks some replicas, is a group of its own
                    if len({program.layout.round_of(i.stage, head.microbatch) for head in heads}) > 1:
                        _refuse(program, worker, position, f"replicas are at {', '.join(map(str, heads))}")
                elif not _meet(worker, i, heads[1]):
                    break
                elif message_of(heads[1]) != message_of(i):
                    _refuse(program, worker, position, f"meets {heads[1]} of worker {i.peer_worker}: another message")
                for w in party:
                    at[w] += 1
                moved = True
    stuck = [(w, *mine[at[w]]) for w, mine in enumerate(waits) if at[w] < len(mine)]
    if stuck:
        worker, position, _ = stuck[0]
        _refuse(program, worker, position, f"deadlock: {'; '.join(f'worker {w} at {i}' for w, _, i in stuck)}")


def _party(program: Program, worker: int, i: Instruction) -> tuple[int, ...]:
    """List the workers that ``i`` waits for, ``worker`` among them."""
    if i.op in SENDS | RECEIVES:
        return (worker, i.peer_worker)
    owners = program.layout.workers[i.stage]
    if i.op is Op.REDUCE:
        return owners
    return owners[: program.n_microbatches - program.layout.round_of(i.stage, i.microbatch) * len(owners)]


def _meet(worker: int, i: Instruction, other: Instruction) -> bool:
    """Say whether a transfer of ``worker`` and what its peer has come to are the two ends of one channel."""
    return other.peer_worker == worker and other.op in SENDS | RECEIVES and (other.op in SENDS) != (i.op in SENDS)
