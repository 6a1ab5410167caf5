"""Who waits for whom in a step that does not move: read off the programs and how far each worker is in its own."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import Waiting
from .instructions import INPUT_GRADIENTS, SENDS, Instruction, Layout, Op
from .program import Program


def waiting(program: Program, layout: Layout, positions: Sequence[int]) -> tuple[Waiting, ...]:
    """Say for each worker what it is at, and what of others it lacks.

    Args:
        program: what the workers run.
        layout: who has which stage.
        positions: per worker, the index of the instruction that it is at.
    """
    found = []
    for worker, (instructions, position) in enumerate(zip(program.workers, positions)):
        at = at_position(instructions, position)
        found.append(
            Waiting(
                worker,
                None if at is None else str(at),
                () if at is None else _lacking(program, layout, positions, worker, at),
            )
        )
    return tuple(found)


def at_position(instructions: Sequence[Instruction], position: int) -> Instruction | None:
    """Return what a worker is at; None if it is through."""
    return instructions[position] if position < len(instructions) else None


def _lacking(
    program: Program, layout: Layout, positions: Sequence[int], worker: int, at: Instruction
) -> tuple[int, ...]:
    """List the workers that have yet to come to the packet that an instruction needs."""
    if at.op is Op.REDUCE:
        others = [owner for owner in layout.workers[at.stage] if owner != worker]
        return tuple(w for w in others if not _has_reduced(program, positions, w, at.stage))
    if at.op is Op.FORWARD:
        needed = [(Op.SEND_ACT, peer) for peer in layout.producers(at.stage)]
    elif at.op in INPUT_GRADIENTS:
        needed = [(Op.SEND_GRAD, peer) for peer in layout.consumers(at.stage, gradients=True)]
    else:
        return ()
    lacking: dict[int, None] = {}
    for op, peer in needed:
        sender = layout.worker_of(peer, at.microbatch)
        if sender != worker and not _has_sent(program, positions, sender, (op, peer, at.microbatch, at.stage)):
            lacking[sender] = None
    return tuple(lacking)


def _has_sent(program: Program, positions: Sequence[int], sender: int, packet: tuple[Op, int, int, int]) -> bool:
    done = program.workers[sender][: positions[sender]]
    return any((i.op, i.stage, i.microbatch, i.peer_stage) == packet for i in done if i.op in SENDS)


def _has_reduced(program: Program, positions: Sequence[int], worker: int, stage: int) -> bool:
    """Say whether a replica has come as far as its sum."""
    upto = program.workers[worker][: positions[worker] + 1]
    return any(i.op is Op.REDUCE and i.stage == stage for i in upto)
