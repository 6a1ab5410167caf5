"""The checks of a program against an executor that blocks wherever a transport may block."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from stagecut.errors import PlanError
from stagecut.runtime.instructions import (
    COMPUTE,
    INPUT_GRADIENTS,
    RECEIVES,
    SENDS,
    WHOLE_BATCH,
    Instruction,
    Layout,
    Op,
)
from stagecut.runtime.program import Program, check, lower
from stagecut.runtime.schedules import ANY_REPLICAS, of_part, schedule
from stagecut.runtime.schedules.families import FAMILIES
from stagecut.runtime.schedules.placement import chain, loop, vee

property_test = settings(max_examples=150, deadline=None, derandomize=True)
mutation_test = settings(max_examples=500, deadline=None, derandomize=True)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """A chain of 1 to 5 stages with 1 to 3 replicas each, skips over any stages, gradients on some of the wires."""
    n_stages = draw(st.integers(1, 5))
    workers, first = [], 0
    for _ in range(n_stages):
        n_replicas = draw(st.integers(1, 3))
        workers.append(tuple(range(first, first + n_replicas)))
        first += n_replicas
    chain = [(s, s + 1) for s in range(n_stages - 1) if draw(st.integers(0, 9))]
    skips = [(a, b) for a in range(n_stages) for b in range(a + 2, n_stages) if not draw(st.integers(0, 2))]
    wires = sorted({*chain, *skips})
    return Layout(tuple(workers), tuple(wires), tuple(wire for wire in wires if draw(st.integers(0, 3))))


def shared(layout: Layout, n_workers: int) -> Layout:
    """The same stages dealt to few workers, so that some own several."""
    workers = tuple(tuple(dict.fromkeys(worker % n_workers for worker in owners)) for owners in layout.workers)
    used = sorted({worker for owners in workers for worker in owners})
    return replace(layout, workers=tuple(tuple(used.index(worker) for worker in owners) for owners in workers))


@st.composite
def programs(draw: st.DrawFn, names: tuple[str, ...]) -> Program:
    layout, name, n = draw(layouts()), draw(st.sampled_from(names)), draw(st.integers(1, 8))
    if "1f1b" not in name and draw(st.booleans()):
        layout = shared(layout, draw(st.integers(1, 4)))
    return lower(name, layout, schedule(name, layout, n), n)


@st.composite
def published(draw: st.DrawFn) -> Program:
    """A program of a published schedule, split backwards and several stages per worker included."""
    family, p, n = draw(st.sampled_from(list(FAMILIES.values()))), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    layout = {"chain": chain(p), "loop": loop(p, 2), "vee": vee(p)}[family.placement]
    n = max(n, family.least(p))
    return lower(family.name, layout, family.make(layout, n), n)


class Broken(Exception):
    """The executor cannot go on."""


class BlockingExecutor:
    """Run a program on values, by rules as strict as a transport's can be.

    A send blocks until the receiving worker stands at a receive from the sender, and what it then gets is what was
    sent, wanted or not. A reduction blocks until every replica of the stage stands at it. So do forwards and backwards
    of stages ``in_lockstep``, for the replicas that have a microbatch in the round.
    """

    def __init__(self, program: Program, in_lockstep: frozenset[int] = frozenset()) -> None:
        self.in_lockstep = in_lockstep
        self.program, self.layout = program, program.layout
        ops = {i.op for instructions in program.workers for i in instructions}
        self.kinds = ops & COMPUTE
        self.at = [0] * len(program.workers)
        self.inbox: dict[tuple[int, Op, int, int], dict[int, tuple[object, ...]]] = defaultdict(dict)
        self.result: dict[tuple[int, Op, int, int], tuple[object, ...]] = {}
        self.ran: list[tuple[Op, int, int]] = []
        self.reduced: list[tuple[int, int]] = []

    def head(self, worker: int) -> Instruction | None:
        mine = self.program.workers[worker]
        return mine[self.at[worker]] if self.at[worker] < len(mine) else None

    def run(self) -> None:
        everyone = range(len(self.at))
        while any(self.head(worker) for worker in everyone):
            if not any(self.step(worker) for worker in everyone):
                raise Broken(f"nobody moves: {[str(self.head(worker)) for worker in everyone]}")
        for s in range(self.layout.n_stages):
            for m in range(self.program.n_microbatches):
                ran = sorted(op.value for op, *where in self.ran if where == [s, m])
                forward = ["F"] if Op.FORWARD in self.kinds else []
                backwards = ([*forward, "I", "W"], ["B", *forward]) if self.kinds - {Op.FORWARD} else (forward,)
                if ran not in [sorted(wanted) for wanted in backwards]:
                    raise Broken(f"{ran} ran for {s}, {m}")
        if self.kinds - {Op.FORWARD}:
            wanted = sorted((s, worker) for s, owners in enumerate(self.layout.workers) for worker in owners)
            if sorted(self.reduced) != wanted:
                raise Broken(f"reduced {self.reduced}")
        if self.result:
            raise Broken(f"still held: {list(self.result)}")

    def step(self, worker: int) -> bool:
        i = self.head(worker)
        if i is None:
            return False
        if i.op is Op.BACKWARD_WEIGHT:
            if self.result.get((worker, Op.BACKWARD, i.stage, i.microbatch)) != (Op.BACKWARD, i.stage, i.microbatch):
                raise Broken(f"{i}: no input gradient")
            self.ran.append((i.op, i.stage, i.microbatch))
        elif i.op in COMPUTE and i.stage in self.in_lockstep:
            return self.round(i)
        elif i.op in COMPUTE:
            self.compute(worker, i)
        elif i.op in SENDS:
            other = self.head(i.peer_worker)
            if other is None or other.op not in RECEIVES or other.peer_worker != worker:
                return False
            self.deliver(worker, i, other)
            self.at[i.peer_worker] += 1
        elif i.op in RECEIVES:
            return False
        elif i.op is Op.FREE:
            for kind in (Op.FORWARD, Op.BACKWARD):
                self.result.pop((worker, kind, i.stage, i.microbatch), None)
                self.inbox.pop((worker, kind, i.stage, i.microbatch), None)
        else:
            owners = self.layout.workers[i.stage]
            if any(self.head(owner) != i for owner in owners):
                return False
            for owner in owners:
                self.at[owner] += 1
                self.reduced.append((i.stage, owner))
            return True
        self.at[worker] += 1
        return True

    def round(self, i: Instruction) -> bool:
        """Compute a whole round, if all of its replicas have come to it."""
        owners = self.layout.workers[i.stage]
        first = i.microbatch - i.microbatch % len(owners)
        present = dict(zip(owners, range(first, self.program.n_microbatches)))
        heads = {owner: self.head(owner) for owner in present}
        if any(head is None or (head.op, head.stage) != (i.op, i.stage) for head in heads.values()):
            return False
        for owner, m in present.items():
            head = heads[owner]
            assert head is not None
            if head.microbatch != m:
                raise Broken(f"replicas exchange statistics of different rounds: {heads}")
            self.compute(owner, head)
            self.at[owner] += 1
        return True

    def compute(self, worker: int, i: Instruction) -> None:
        s, m = i.stage, i.microbatch
        backward = i.op in INPUT_GRADIENTS
        kind = Op.BACKWARD if backward else Op.FORWARD
        peers = self.layout.consumers(s, gradients=True) if backward else self.layout.producers(s)
        given_by = self.inbox[worker, kind, s, m]
        for peer in peers:
            if given_by.get(peer) != (kind, peer, m):
                raise Broken(f"{i} on worker {worker} has {given_by.get(peer)} of stage {peer}")
        if backward and Op.FORWARD in self.kinds and (worker, Op.FORWARD, s, m) not in self.result:
            raise Broken(f"{i}: no activations")
        if self.layout.worker_of(s, m) == worker:
            self.ran.append((i.op, s, m))
        self.result[worker, kind, s, m] = (kind, s, m)
        targets = self.layout.producers(s, gradients=True) if backward else self.layout.consumers(s)
        for target in targets:
            if self.layout.worker_of(target, m) == worker:
                self.inbox[worker, kind, target, m][s] = (kind, s, m)

    def deliver(self, worker: int, send: Instruction, receive: Instruction) -> None:
        kind = Op.FORWARD if send.op is Op.SEND_ACT else Op.BACKWARD
        if (worker, kind, send.stage, send.microbatch) not in self.result:
            raise Broken(f"{send}: nothing to send")
        wanted = Op.FORWARD if receive.op is Op.RECV_ACT else Op.BACKWARD
        packet = self.result[worker, kind, send.stage, send.microbatch]
        self.inbox[send.peer_worker, wanted, receive.stage, receive.microbatch][receive.peer_stage] = packet


def dependent(a: Instruction, b: Instruction) -> bool:
    return (a.stage, a.microbatch) == (b.stage, b.microbatch) or WHOLE_BATCH in (a.microbatch, b.microbatch)


@st.composite
def damaged(draw: st.DrawFn) -> Program:
    """A program of a schedule with one to three of its instructions dropped, doubled, moved or exchanged."""
    fused = programs((*ANY_REPLICAS, "forward-only", "backward-only"))
    program = draw(st.one_of(fused, published()))
    workers = [list(instructions) for instructions in program.workers]
    for _ in range(draw(st.integers(1, 3))):
        mine = workers[draw(st.sampled_from([w for w, own in enumerate(workers) if own] or [0]))]
        what = draw(st.sampled_from(["drop", "double", "exchange", "exchange dependent", "move"]))
        position = draw(st.integers(0, max(0, len(mine) - 1)))
        if what == "exchange dependent":
            pairs = [p for p in range(len(mine) - 1) if dependent(mine[p], mine[p + 1])]
            position = draw(st.sampled_from(pairs)) if pairs else position
        if not mine:
            continue
        if what == "drop":
            del mine[position]
        elif what == "double":
            mine.insert(position, mine[position])
        elif what == "move":
            mine.insert(draw(st.integers(0, len(mine) - 1)), mine.pop(position))
        elif position + 1 < len(mine):
            mine[position], mine[position + 1] = mine[position + 1], mine[position]
    return replace(program, workers=tuple(tuple(own) for own in workers))


@property_test
@given(st.one_of(programs((*ANY_REPLICAS, "forward-only", "backward-only")), published()))
def test_what_lowering_makes_is_accepted_and_runs_even_if_every_transfer_blocks(program: Program) -> None:
    check(program)
    BlockingExecutor(program).run()


@property_test
@given(st.data())
def test_equal_replicas_may_wait_for_each_other_in_any_stage(data: st.DataObject) -> None:
    draw = data.draw
    family, p, r = draw(st.sampled_from(list(FAMILIES.values()))), draw(st.integers(1, 3)), draw(st.integers(2, 3))
    one = {"chain": chain(p), "loop": loop(p, 2), "vee": vee(p)}[family.placement]
    workers = tuple(tuple(owners[0] * r + replica for replica in range(r)) for owners in one.workers)
    layout = replace(one, workers=workers)
    n = draw(st.integers(r * family.least(p), r * family.least(p) + 7))  # the last round may lack some replicas
    in_lockstep = frozenset(draw(st.sets(st.sampled_from(range(layout.n_stages)), min_size=1)))
    orders = of_part(family.name, layout, n, in_rounds=True)
    program = lower(family.name, layout, orders, n, in_lockstep)
    check(program, in_lockstep=in_lockstep)
    BlockingExecutor(program, in_lockstep).run()


def test_replicas_that_wait_for_each_other_in_different_rounds_are_refused() -> None:
    layout = Layout(((0, 1),), (), ())
    program = lower("fill-drain", layout, schedule("fill-drain", layout, 4), 4)
    check(program, in_lockstep=frozenset({0}))
    first, second = program.workers
    forwards = [p for p, i in enumerate(second) if i.op is Op.FORWARD]
    crossed = list(second)
    crossed[forwards[0]], crossed[forwards[1]] = second[forwards[1]], second[forwards[0]]
    turned = replace(program, workers=(first, tuple(crossed)))
    check(turned)
    message = r"replicas are at F\(stage 0, microbatch 0\), F\(stage 0, microbatch 3\)"
    with pytest.raises(PlanError, match=message):
        check(turned, in_lockstep=frozenset({0}))


@mutation_test
@given(damaged(), st.data())
def test_a_damaged_program_is_refused_or_runs_to_its_end(program: Program, data: st.DataObject) -> None:
    stages = range(program.layout.n_stages)
    in_lockstep = frozenset(data.draw(st.sets(st.sampled_from(stages))))
    try:
        check(program, in_lockstep=in_lockstep)
    except PlanError as error:
        refusal = error.message
    else:
        refusal = None
    event("accepted" if refusal is None else "refused")
    if refusal is None:
        BlockingExecutor(program, in_lockstep).run()
        return
    named = {str(i) for instructions in program.workers for i in instructions}
    missing = {
        str(Instruction(op, s, m))
        for op in COMPUTE
        for s in range(program.layout.n_stages)
        for m in range(program.n_microbatches)
    }
    kept = "is never freed" in refusal or "never completes its gradients" in refusal
    assert kept or any(name in refusal for name in named | missing)


def two_workers(first: list[Instruction], second: list[Instruction]) -> Program:
    layout = Layout(((0,), (1,)), ((0, 1),), ((0, 1),))
    return Program("by hand", layout, 2, (tuple(first), tuple(second)))


def by_hand() -> tuple[list[Instruction], list[Instruction]]:
    """Two stages, two microbatches, one forward one backward."""
    first = [
        Instruction(Op.FORWARD, 0, 0),
        Instruction(Op.SEND_ACT, 0, 0, 1, 1),
        Instruction(Op.FORWARD, 0, 1),
        Instruction(Op.RECV_GRAD, 0, 0, 1, 1),
        Instruction(Op.SEND_ACT, 0, 1, 1, 1),
        Instruction(Op.BACKWARD, 0, 0),
        Instruction(Op.FREE, 0, 0),
        Instruction(Op.RECV_GRAD, 0, 1, 1, 1),
        Instruction(Op.BACKWARD, 0, 1),
        Instruction(Op.FREE, 0, 1),
        Instruction(Op.REDUCE, 0, WHOLE_BATCH),
    ]
    second = [
        Instruction(Op.RECV_ACT, 1, 0, 0, 0),
        Instruction(Op.FORWARD, 1, 0),
        Instruction(Op.BACKWARD, 1, 0),
        Instruction(Op.SEND_GRAD, 1, 0, 0, 0),
        Instruction(Op.FREE, 1, 0),
        Instruction(Op.RECV_ACT, 1, 1, 0, 0),
        Instruction(Op.FORWARD, 1, 1),
        Instruction(Op.BACKWARD, 1, 1),
        Instruction(Op.SEND_GRAD, 1, 1, 0, 0),
        Instruction(Op.FREE, 1, 1),
        Instruction(Op.REDUCE, 1, WHOLE_BATCH),
    ]
    return first, second


def test_a_program_written_by_hand_is_accepted() -> None:
    check(two_workers(*by_hand()))


def test_two_workers_that_each_send_before_they_receive_are_in_a_deadlock() -> None:
    first, second = by_hand()
    first[3], first[4] = first[4], first[3]  # sends microbatch 1 while worker 1 sends the gradient of microbatch 0
    with pytest.raises(PlanError, match="deadlock") as refused:
        check(two_workers(first, second))
    assert "worker 0, instruction 3, send activation(stage 0, microbatch 1) to stage 1" in refused.value.message
    assert "worker 1 at send gradient(stage 1, microbatch 0) to stage 0" in refused.value.message


def test_messages_that_pass_each_other_on_one_channel_are_refused() -> None:
    layout = Layout(((0,), (1,)), ((0, 1),), ())
    first = [Instruction(Op.FORWARD, 0, 0), Instruction(Op.FORWARD, 0, 1)]
    first += [Instruction(Op.SEND_ACT, 0, 1, 1, 1), Instruction(Op.SEND_ACT, 0, 0, 1, 1)]
    first += [Instruction(Op.FREE, 0, 0), Instruction(Op.FREE, 0, 1)]
    second = [Instruction(Op.RECV_ACT, 1, 0, 0, 0), Instruction(Op.RECV_ACT, 1, 1, 0, 0)]
    second += [Instruction(Op.FORWARD, 1, 0), Instruction(Op.FREE, 1, 0)]
    second += [Instruction(Op.FORWARD, 1, 1), Instruction(Op.FREE, 1, 1)]
    with pytest.raises(PlanError, match=r"send activation\(stage 0, microbatch 1\).*another message"):
        check(Program("crossing", layout, 2, (tuple(first), tuple(second))))


def remove(program: list[Instruction], op: Op, microbatch: int) -> list[Instruction]:
    return [i for i in program if (i.op, i.microbatch) != (op, microbatch)]


def test_each_broken_rule_is_named() -> None:
    first, second = by_hand()
    cases = {
        r"F\(stage 1, microbatch 0\) is missing": (first, remove(second, Op.FORWARD, 0)),
        r"free\(stage 0, microbatch 0\): uses what was freed before": (first[:6] + first[6:7] * 2 + first[7:], second),
        r"B\(stage 0, microbatch 1\): runs more than once": (first[:9] + first[8:], second),
        r"worker 1: stage 1 never completes its gradients": (first, second[:-1]),
        r"worker 1: stage 1, microbatch 1 is never freed": (first, remove(second, Op.FREE, 1)),
        r"B\(stage 1, microbatch 0\): uses what was freed before": (
            first,
            [*second[:2], second[4], *second[2:4], *second[5:]],
        ),
        r"F\(stage 1, microbatch 0\): needs the packet of stage 0": (first, second[1:2] + second[:1] + second[2:]),
        r"B\(stage 1, microbatch 0\): its forward has not run": (first, [second[0], second[2], second[1], *second[3:]]),
        r"send gradient\(stage 1, microbatch 0\).*sends what has not been computed": (
            first,
            [*second[:2], second[3], second[2], *second[4:]],
        ),
        r"B\(stage 0, microbatch 0\): runs after the gradients of its stage were reduced": (
            [first[-1], *first[:-1]],
            second,
        ),
        r"F\(stage 1, microbatch 0\): this worker does not own that stage": ([*first, second[1]], second),
    }
    for words, (one, two) in cases.items():
        with pytest.raises(PlanError, match=words):
            check(two_workers(one, two))


def split() -> tuple[list[Instruction], list[Instruction]]:
    """The same with the backward of stage 1's first microbatch in two parts."""
    first, second = by_hand()
    second[2] = Instruction(Op.BACKWARD_INPUT, 1, 0)
    second.insert(4, Instruction(Op.BACKWARD_WEIGHT, 1, 0))
    return first, second


def test_a_backward_in_two_parts_is_accepted_and_its_rules_are_named() -> None:
    first, second = split()
    check(two_workers(first, second))
    weight, whole = second[4], Instruction(Op.BACKWARD, 1, 0)
    cases = {
        r"I\(stage 1, microbatch 0\) is missing": (first, remove(second, Op.BACKWARD_INPUT, 0)),
        r"W\(stage 1, microbatch 0\) is missing": (first, remove(second, Op.BACKWARD_WEIGHT, 0)),
        r"W\(stage 1, microbatch 0\): its input gradient has not run": (
            first,
            [*second[:2], weight, *second[2:4], *second[5:]],
        ),
        r"B\(stage 1, microbatch 0\): the gradients of its inputs were computed before": (
            first,
            [*second[:3], whole, *second[3:]],
        ),
        r"W\(stage 1, microbatch 0\): uses what was freed before": (
            first,
            [*second[:4], second[5], weight, *second[6:]],
        ),
        r"W\(stage 1, microbatch 0\): runs after the gradients of its stage were reduced": (
            first,
            [*second[:4], second[-1], weight, second[5], *second[6:-1]],
        ),
    }
    for words, (one, two) in cases.items():
        with pytest.raises(PlanError, match=words):
            check(two_workers(one, two))


def test_the_memory_cap_is_counted_in_microbatches_held_at_once() -> None:
    program = two_workers(*by_hand())
    check(program, max_in_flight=(2, 1))
    with pytest.raises(PlanError, match=r"worker 0.*F\(stage 0, microbatch 1\): holds 2 microbatches where 1 fit"):
        check(program, max_in_flight=(1, 1))


def test_a_transfer_that_no_wire_asks_for_or_that_comes_twice_is_refused() -> None:
    first, second = by_hand()
    again = r"send activation\(stage 0, microbatch 0\) to stage 1 on worker 1: moves the same packet again"
    with pytest.raises(PlanError, match=again):
        check(two_workers([*first[:2], *first[1:]], [second[0], *second]))
    without = Layout(((0,), (1,)), (), ())
    program = replace(two_workers(first, second), layout=without)
    with pytest.raises(PlanError, match=r"send activation\(stage 0, microbatch 0\).*no wire carries that from stage 0"):
        check(program)
    elsewhere = [replace(i, peer_worker=7) if i.op in SENDS else i for i in first]
    with pytest.raises(PlanError, match=r"to stage 1 on worker 7: worker 1 owns the other end"):
        check(two_workers(elsewhere, second))


def test_a_stage_or_microbatch_that_does_not_exist_is_refused() -> None:
    first, second = by_hand()
    for wrong in (Instruction(Op.FREE, 2, 0), Instruction(Op.FREE, -2, 0), Instruction(Op.FORWARD, 0, 2)):
        with pytest.raises(PlanError, match=r"instruction 11, .*\(stage .*this worker does not own that stage"):
            check(two_workers([*first, wrong], second))
    of_a_microbatch = [*first, Instruction(Op.REDUCE, 0, 1)]
    with pytest.raises(PlanError, match=r"instruction 11, reduce\(stage 0, microbatch 1\): this worker does not own"):
        check(two_workers(of_a_microbatch, second))


def test_a_step_that_has_lost_all_its_backwards_or_forwards_is_refused() -> None:
    layout = Layout(((0, 1),), (), ())
    both = frozenset({Op.FORWARD, Op.BACKWARD})
    step = lower("fill-drain", layout, schedule("fill-drain", layout, 2), 2)
    check(step, computes=both)
    for lost in (Op.FORWARD, Op.BACKWARD):
        left = replace(step, workers=tuple(tuple(i for i in own if i.op is not lost) for own in step.workers))
        with pytest.raises(PlanError, match=rf"{lost.value}\(stage 0, microbatch 0\) is missing"):
            check(left, computes=both)
    forwards = lower("forward-only", layout, schedule("forward-only", layout, 2), 2)
    check(forwards, computes=frozenset({Op.FORWARD}))
    with pytest.raises(PlanError, match=r"F\(stage 0, microbatch 0\): there are only backwards to do"):
        check(step, computes=frozenset({Op.BACKWARD}))
    reduced = replace(
        forwards, workers=tuple((*own, Instruction(Op.REDUCE, 0, WHOLE_BATCH)) for own in forwards.workers)
    )
    with pytest.raises(PlanError, match=r"reduce\(stage 0\): there are only forwards to do"):
        check(reduced)


@pytest.mark.parametrize("owners", [(0, 1), (1, 0)])
def test_a_last_round_that_lacks_replicas_is_exchanged_by_itself_whoever_is_looked_at_first(
    owners: tuple[int, int],
) -> None:
    """The replica that alone has a third microbatch may compute it before the round that it shares."""
    layout = Layout((owners,), (), ())
    program = lower("forward-only", layout, schedule("forward-only", layout, 3), 3)
    a, b = sorted((i for i in program.workers[owners[0]] if i.op is Op.FORWARD), key=lambda i: -i.microbatch)
    frees = [Instruction(Op.FREE, 0, a.microbatch), Instruction(Op.FREE, 0, b.microbatch)]
    workers = list(program.workers)
    workers[owners[0]] = (a, b, *frees)
    turned = replace(program, workers=tuple(workers))
    check(turned, in_lockstep=frozenset({0}))
    BlockingExecutor(turned).run()
