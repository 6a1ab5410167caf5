"""Who waits for whom is read off programs and positions."""

from __future__ import annotations

from stagecut.runtime.engine import of_part
from stagecut.runtime.instructions import Layout, Op
from stagecut.runtime.program import Program, check, lower
from stagecut.runtime.waiting import at_position, waiting

LAYOUT = Layout(((0,), (1, 2), (3,)), ((0, 1), (1, 2), (0, 2)), ((0, 1), (1, 2), (0, 2)))


def program() -> Program:
    made = lower("1f1b", LAYOUT, of_part("1f1b", LAYOUT, 4, in_rounds=False), 4)
    check(made)
    return made


def at(made: Program, worker: int, op: Op, microbatch: int) -> int:
    return next(p for p, i in enumerate(made.workers[worker]) if (i.op, i.microbatch) == (op, microbatch))


def test_at_the_start_everybody_waits_for_the_first_stage() -> None:
    made = program()
    starts = [at(made, w, Op.FORWARD, m) for w, m in ((0, 0), (1, 0), (2, 1), (3, 0))]
    found = waiting(made, LAYOUT, starts)
    assert [each.waits_for for each in found] == [(), (0,), (0,), (0, 1)]
    assert str(found[3]) == "worker 3 is at F(stage 2, microbatch 0) and waits for worker 0 and 1"


def test_a_backward_waits_for_gradients_that_were_not_sent() -> None:
    made = program()
    n = [len(instructions) for instructions in made.workers]
    positions = [at(made, 0, Op.BACKWARD, 1), n[1], at(made, 2, Op.BACKWARD, 1), at(made, 3, Op.BACKWARD, 1)]
    found = waiting(made, LAYOUT, positions)
    assert [each.waits_for for each in found] == [(2, 3), (), (3,), ()]
    assert str(found[1]) == "worker 1 is through with its program"
    assert at_position(made.workers[1], n[1]) is None


def test_a_replica_at_its_sum_waits_for_the_one_that_is_not() -> None:
    made = program()
    positions = [0, at(made, 1, Op.REDUCE, -1), at(made, 2, Op.BACKWARD, 3), 0]
    assert waiting(made, LAYOUT, positions)[1].waits_for == (2,)
    positions[2] = at(made, 2, Op.REDUCE, -1)
    assert waiting(made, LAYOUT, positions)[1].waits_for == ()
