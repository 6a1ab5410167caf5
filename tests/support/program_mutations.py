"""Programs with mistakes in them: instructions dropped, doubled, moved, exchanged or changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from stagecut.runtime.instructions import RECEIVES, SENDS, Instruction, Op
from stagecut.runtime.program import Program

Workers = list[list[Instruction]]
_OTHER_END = {
    Op.SEND_ACT: Op.RECV_ACT,
    Op.SEND_GRAD: Op.RECV_GRAD,
    Op.RECV_ACT: Op.SEND_ACT,
    Op.RECV_GRAD: Op.SEND_GRAD,
}


def changed_fields(i: Instruction, program: Program) -> Iterator[Instruction]:
    """Every instruction that differs from ``i`` in one field, with values just outside of what exists too."""
    stages, microbatches = range(-1, program.layout.n_stages + 1), range(-1, program.n_microbatches + 1)
    workers = range(-1, len(program.workers) + 1)
    yield from (replace(i, op=op) for op in Op if op is not i.op)
    yield from (replace(i, stage=s) for s in stages if s != i.stage)
    yield from (replace(i, microbatch=m) for m in microbatches if m != i.microbatch)
    yield from (replace(i, peer_stage=s) for s in stages if s != i.peer_stage)
    yield from (replace(i, peer_worker=w) for w in workers if w != i.peer_worker)


def single_mutations(program: Program) -> Iterator[Program]:
    """Every program that is one drop, one doubling, one move, one exchange or one changed field away."""
    workers = program.workers
    for w, own in enumerate(workers):
        for p, i in enumerate(own):
            yield _with(program, w, own[:p] + own[p + 1 :])
            yield _with(program, w, own[: p + 1] + own[p:])
            rest = own[:p] + own[p + 1 :]
            yield from (_with(program, w, (*rest[:q], i, *rest[q:])) for q in range(len(own)) if q != p)
            yield from (_with(program, w, (*own[:p], j, *own[p + 1 :])) for j in changed_fields(i, program))
            places = [(v, q) for v in range(w, len(workers)) for q in range(len(workers[v]))]
            for v, q in (place for place in places if place > (w, p)):
                lists = [list(each) for each in workers]
                lists[w][p], lists[v][q] = lists[v][q], lists[w][p]
                yield _of(program, lists)


def _with(program: Program, worker: int, own: tuple[Instruction, ...]) -> Program:
    return replace(program, workers=(*program.workers[:worker], own, *program.workers[worker + 1 :]))


def _of(program: Program, workers: Workers) -> Program:
    return replace(program, workers=tuple(map(tuple, workers)))


def mutated(program: Program, random: Random, count: int) -> Program:
    """Return the program with so many mistakes, each of a random kind at a random place."""
    workers = [list(own) for own in program.workers]
    for _ in range(count):
        busy = [w for w, own in enumerate(workers) if own]
        if not busy:
            break
        w = random.choice(busy)
        random.choice(_MISTAKES)(program, workers, w, random.randrange(len(workers[w])), random)
    return _of(program, workers)


def _drop(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    del workers[w][p]


def _double(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    workers[w].insert(random.randint(0, len(workers[w])), workers[w][p])


def _move(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    i = workers[w].pop(p)
    workers[w].insert(random.randint(0, len(workers[w])), i)


def _move_a_little(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    workers[w].insert(max(0, p + random.choice((-2, -1, 1, 2))), workers[w].pop(p))


def _exchange(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    q = random.randrange(len(workers[w]))
    workers[w][p], workers[w][q] = workers[w][q], workers[w][p]


def _exchange_workers(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    v = random.randrange(len(workers))
    if workers[v]:
        q = random.randrange(len(workers[v]))
        workers[w][p], workers[v][q] = workers[v][q], workers[w][p]


def _give_away(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    v = random.randrange(len(workers))
    workers[v].insert(random.randint(0, len(workers[v])), workers[w].pop(p) if v != w else workers[w][p])


def _change(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    workers[w][p] = random.choice(list(changed_fields(workers[w][p], program)))


def _change_all_of_a_kind(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    """Drop a kind of instruction everywhere, as if the step had none."""
    op = workers[w][p].op
    for own in workers:
        own[:] = [i for i in own if i.op is not op]


def _both_ends(workers: Workers, w: int, p: int) -> tuple[int, int] | None:
    """Find the other end of a transfer."""
    i = workers[w][p]
    if i.op not in SENDS | RECEIVES or not 0 <= i.peer_worker < len(workers):
        return None
    end = Instruction(_OTHER_END[i.op], i.peer_stage, i.microbatch, i.stage, w)
    own = workers[i.peer_worker]
    return (i.peer_worker, own.index(end)) if end in own else None


def _drop_both_ends(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    end = _both_ends(workers, w, p)
    if end is not None:
        del workers[end[0]][end[1]]
        del workers[w][p]


def _double_both_ends(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    end = _both_ends(workers, w, p)
    if end is not None:
        workers[end[0]].insert(end[1], workers[end[0]][end[1]])
        workers[w].insert(p, workers[w][p])


def _change_both_ends(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    end = _both_ends(workers, w, p)
    if end is None:
        return
    i, (v, q) = workers[w][p], end
    s, m = random.randrange(program.layout.n_stages), random.randrange(program.n_microbatches)
    i = random.choice((replace(i, stage=s), replace(i, peer_stage=s), replace(i, microbatch=m)))
    if random.random() < 0.3:
        other = {Op.SEND_ACT: Op.SEND_GRAD, Op.RECV_ACT: Op.RECV_GRAD}
        i = replace(i, op={**other, **{b: a for a, b in other.items()}}[i.op])
    workers[w][p] = i
    workers[v][q] = Instruction(_OTHER_END[i.op], i.peer_stage, i.microbatch, i.stage, w)


def _split_backward(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    """Two parts in place of a backward: harmless, until the second part goes astray."""
    i = workers[w][p]
    if i.op is Op.BACKWARD:
        workers[w][p : p + 1] = [replace(i, op=Op.BACKWARD_INPUT), replace(i, op=Op.BACKWARD_WEIGHT)]


def _join_backward(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    i = workers[w][p]
    second = replace(i, op=Op.BACKWARD_WEIGHT)
    if i.op is Op.BACKWARD_INPUT and second in workers[w]:
        workers[w][p] = replace(i, op=Op.BACKWARD)
        workers[w].remove(second)


def _lose_microbatch(program: Program, workers: Workers, w: int, p: int, random: Random) -> None:
    """Leave a microbatch out everywhere, or only its backward part."""
    m, backward = workers[w][p].microbatch, random.random() < 0.5
    lost = {Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT, Op.SEND_GRAD, Op.RECV_GRAD} if backward else set(Op)
    for own in workers:
        own[:] = [i for i in own if i.microbatch != m or i.op not in lost]


_Mistake = Callable[[Program, Workers, int, int, Random], None]
_MISTAKES: tuple[_Mistake, ...] = (
    _drop,
    _double,
    _move,
    _move_a_little,
    _move_a_little,
    _exchange,
    _exchange_workers,
    _give_away,
    _change,
    _change,
    _change_all_of_a_kind,
    _drop_both_ends,
    _double_both_ends,
    _change_both_ends,
    _change_both_ends,
    _split_backward,
    _join_backward,
    _lose_microbatch,
)
