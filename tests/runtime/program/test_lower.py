"""Lowering: what every compute of a schedule becomes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.errors import ConstraintError
from stagecut.runtime.instructions import (
    COMPUTE,
    RECEIVES,
    SENDS,
    WHOLE_BATCH,
    Action,
    Instruction,
    Layout,
    Op,
)
from stagecut.runtime.program import check, lower
from stagecut.runtime.program.check import message_of
from stagecut.runtime.schedules import ANY_REPLICAS, schedule

property_test = settings(max_examples=120, deadline=None, derandomize=True)
ALL = (*ANY_REPLICAS, "forward-only", "backward-only")
PAIR = Layout(((0,), (1,)), ((0, 1),), ((0, 1),))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    n_stages = draw(st.integers(1, 5))
    workers, first = [], 0
    for _ in range(n_stages):
        n_replicas = draw(st.integers(1, 3))
        workers.append(tuple(range(first, first + n_replicas)))
        first += n_replicas
    pairs = [(a, b) for a in range(n_stages) for b in range(a + 1, n_stages)]
    wires = [pair for pair in pairs if pair[1] == pair[0] + 1 or draw(st.booleans())]
    return Layout(tuple(workers), tuple(wires), tuple(wire for wire in wires if draw(st.booleans())))


@property_test
@given(st.sampled_from(ALL), layouts(), st.integers(1, 8))
def test_every_schedule_lowers_to_a_program_that_passes_the_checks(name: str, layout: Layout, n: int) -> None:
    program = lower(name, layout, schedule(name, layout, n), n)
    check(program)
    assert (program.name, program.layout, program.n_microbatches) == (name, layout, n)
    assert len(program.workers) == layout.n_workers


@property_test
@given(st.sampled_from(ALL), layouts(), st.integers(1, 8))
def test_computes_keep_the_order_of_the_schedule(name: str, layout: Layout, n: int) -> None:
    orders = schedule(name, layout, n)
    for order, instructions in zip(orders, lower(name, layout, orders, n).workers, strict=True):
        kept = [Action(i.op.value, i.stage, i.microbatch) for i in instructions if i.op in COMPUTE]
        assert kept == list(order)


@property_test
@given(st.sampled_from(ALL), layouts(), st.integers(1, 8))
def test_every_wire_is_one_message_per_microbatch_with_both_ends(name: str, layout: Layout, n: int) -> None:
    program = lower(name, layout, schedule(name, layout, n), n)
    sent, received = Counter(), Counter()
    for worker, instructions in enumerate(program.workers):
        for i in instructions:
            if i.op in SENDS:
                sent[message_of(i), worker, i.peer_worker] += 1
            elif i.op in RECEIVES:
                received[message_of(i), i.peer_worker, worker] += 1
    wanted = Counter()
    for m in range(n):
        for a, b in layout.wires if name != "backward-only" else ():
            wanted[(Op.SEND_ACT, a, b, m), layout.worker_of(a, m), layout.worker_of(b, m)] += 1
        for a, b in layout.gradient_wires if name != "forward-only" else ():
            wanted[(Op.SEND_GRAD, b, a, m), layout.worker_of(b, m), layout.worker_of(a, m)] += 1
    assert sent == received == wanted


@property_test
@given(st.sampled_from(ALL), layouts(), st.integers(1, 8))
def test_every_replica_reduces_once_and_last_also_without_a_microbatch(name: str, layout: Layout, n: int) -> None:
    program = lower(name, layout, schedule(name, layout, n), n)
    for s, owners in enumerate(layout.workers):
        for worker in owners:
            places = [p for p, i in enumerate(program.workers[worker]) if i.op is Op.REDUCE]
            assert len(places) == (0 if name == "forward-only" else 1)
            if places:
                assert places == [len(program.workers[worker]) - 1]
                assert program.workers[worker][-1] == Instruction(Op.REDUCE, s, WHOLE_BATCH)


def test_replicas_of_stages_that_share_workers_reduce_in_the_same_order_everywhere() -> None:
    layout = Layout(((0,), (1,), (1, 0), (1, 0)), ((0, 1), (1, 2), (2, 3)), ((0, 1), (1, 2), (2, 3)))
    program = lower("fill-drain", layout, schedule("fill-drain", layout, 1), 1)
    check(program)
    reduced = [[i.stage for i in own if i.op is Op.REDUCE and i.stage > 1] for own in program.workers]
    assert reduced[0] == reduced[1] == [3, 2]


def test_values_between_stages_of_one_worker_are_not_sent() -> None:
    layout = Layout(((0,), (0,)), ((0, 1),), ((0, 1),))
    program = lower("fill-drain", layout, schedule("fill-drain", layout, 2), 2)
    check(program)
    assert not [i for i in program.workers[0] if i.op in SENDS | RECEIVES]


def test_a_wire_without_gradient_sends_nothing_back() -> None:
    layout = Layout(((0,), (1,)), ((0, 1),), ())
    program = lower("1f1b", layout, schedule("1f1b", layout, 2), 2)
    check(program)
    assert not [i for own in program.workers for i in own if i.op in (Op.SEND_GRAD, Op.RECV_GRAD)]


def test_a_program_prints_one_instruction_a_line() -> None:
    assert str(lower("1f1b", PAIR, schedule("1f1b", PAIR, 1), 1)).splitlines() == [
        "1f1b: 2 stages, 1 microbatches",
        "worker 0:",
        "  F(stage 0, microbatch 0)",
        "  send activation(stage 0, microbatch 0) to stage 1 on worker 1",
        "  receive gradient(stage 0, microbatch 0) from stage 1 on worker 1",
        "  B(stage 0, microbatch 0)",
        "  free(stage 0, microbatch 0)",
        "  reduce(stage 0)",
        "worker 1:",
        "  receive activation(stage 1, microbatch 0) from stage 0 on worker 0",
        "  F(stage 1, microbatch 0)",
        "  B(stage 1, microbatch 0)",
        "  send gradient(stage 1, microbatch 0) to stage 0 on worker 0",
        "  free(stage 1, microbatch 0)",
        "  reduce(stage 1)",
    ]


def test_orders_that_wait_for_each_other_are_refused_with_who_waits_at_what() -> None:
    orders = (
        (Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)),
        (Action("F", 1, 0), Action("F", 1, 1), Action("B", 1, 0), Action("B", 1, 1)),
    )
    with pytest.raises(ConstraintError, match=r"waits for itself: worker 0 at B0\.0, worker 1 at F1\.1"):
        lower("by hand", PAIR, orders, 2)
