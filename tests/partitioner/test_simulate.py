"""The simulator against closed forms, and against the rules that any timeline obeys."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.errors import PlanError
from stagecut.partitioner.cluster import Link
from stagecut.partitioner.simulate import StepCosts, simulate
from stagecut.runtime.instructions import Instruction, Layout, Op
from stagecut.runtime.program import Program, Span, Timeline, lower
from stagecut.runtime.schedules import ANY_REPLICAS, schedule

property_test = settings(max_examples=100, deadline=None, derandomize=True)
FREE_LINK = Link(0.0, float("inf"), "none")


def chain(*replicas: int, skips: tuple[tuple[int, int], ...] = ()) -> Layout:
    workers, first = [], 0
    for count in replicas:
        workers.append(tuple(range(first, first + count)))
        first += count
    wires = (*((s, s + 1) for s in range(len(replicas) - 1)), *skips)
    return Layout(tuple(workers), wires, wires)


def program_of(name: str, layout: Layout, m: int) -> Program:
    return lower(name, layout, schedule(name, layout, m), m)


def uniform(p: int, forward_s: float, backward_s: float, link: Link = FREE_LINK, n_bytes: float = 0.0) -> StepCosts:
    packets = {(a, b): n_bytes for a in range(p) for b in range(a + 1, p)}
    return StepCosts((forward_s,) * p, (backward_s,) * p, packets, link)


@pytest.mark.parametrize("name", ANY_REPLICAS)
@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 5), (2, 1), (2, 6), (4, 3), (4, 8)])
def test_equal_stages_take_one_slot_per_microbatch_and_one_per_further_stage(name: str, p: int, m: int) -> None:
    timeline = simulate(program_of(name, chain(*[1] * p), m), uniform(p, 0.25, 0.75))
    assert timeline.makespan_s == pytest.approx((m + p - 1) * (0.25 + 0.75))
    assert timeline.source == "simulated"
    assert timeline.n_workers == p


def test_one_stage_works_without_a_pause() -> None:
    timeline = simulate(program_of("1f1b", chain(1), 3), StepCosts((1.0,), (2.0,), {}, FREE_LINK))
    assert timeline.makespan_s == pytest.approx(9.0)
    assert timeline.bubble == pytest.approx(0.0)


def test_one_microbatch_pays_every_link_there_and_back() -> None:
    p, link = 4, Link(0.5, 100.0, "made up")
    timeline = simulate(program_of("fill-drain", chain(*[1] * p), 1), uniform(p, 1.0, 2.0, link, n_bytes=25.0))
    assert timeline.makespan_s == pytest.approx(p * 3.0 + 2 * (p - 1) * (0.5 + 25.0 / 100.0))


def test_a_link_that_no_one_waits_for_costs_nothing() -> None:
    """The skip's packet is there long before the chain's."""
    layout = chain(1, 1, 1, skips=((0, 2),))
    costs = replace(uniform(3, 1.0, 1.0), packet_bytes={(0, 2): 90.0}, link=Link(0.0, 100.0, "made up"))
    plain = simulate(program_of("forward-only", chain(1, 1, 1), 1), costs)
    assert simulate(program_of("forward-only", layout, 1), costs).makespan_s == plain.makespan_s == 3.0
    slow = replace(costs, packet_bytes={(0, 2): 300.0})
    assert simulate(program_of("forward-only", layout, 1), slow).makespan_s == pytest.approx(1.0 + 3.0 + 1.0)


def test_the_longest_path_through_unequal_stages_is_the_makespan() -> None:
    costs = StepCosts((1.0, 4.0, 2.0), (2.0, 8.0, 4.0), {}, FREE_LINK)
    m = 5
    timeline = simulate(program_of("fill-drain", chain(1, 1, 1), m), costs)
    # The slow stage never pauses after its first forward: forwards, the last one's turn at stage 2, backwards.
    forwards = 1.0 + m * 4.0 + 2.0
    backwards = 4.0 + m * 8.0 + 2.0
    assert timeline.makespan_s == pytest.approx(forwards + backwards)


def test_packing_keeps_the_sender_busy_and_the_message_travels_beside_compute() -> None:
    link = Link(5.0, 100.0, "made up")
    costs = replace(uniform(2, 1.0, 1.0, link, 10.0), send_overhead_s=0.25, pack_bytes_per_s=20.0)
    timeline = simulate(program_of("forward-only", chain(1, 1), 2), costs)
    assert [(s.op, s.start_s, s.end_s) for s in timeline.spans if s.worker == 0] == [
        ("F", 0.0, 1.0),
        ("send activation", 1.0, 1.75),
        ("F", 1.75, 2.75),
        ("send activation", 2.75, 3.5),
    ]
    first, second = (s for s in timeline.spans if s.worker == 1)
    assert (first.start_s, second.start_s) == pytest.approx((1.75 + 5.1, 3.5 + 5.1))


def test_the_overhead_of_an_action_is_paid_by_every_compute() -> None:
    costs = replace(uniform(1, 1.0, 2.0), action_overhead_s=0.5)
    assert simulate(program_of("1f1b", chain(1), 4), costs).makespan_s == pytest.approx(4 * (1.5 + 2.5))


def test_a_reduction_starts_when_the_last_replica_is_there_and_ends_for_all_at_once() -> None:
    costs = StepCosts((1.0,), (2.0,), {}, FREE_LINK, reduce_s=(4.0,))
    timeline = simulate(program_of("1f1b", chain(2), 3), costs)
    reductions = [(s.worker, s.start_s, s.end_s) for s in timeline.spans if s.op == "reduce"]
    assert reductions == [(0, 6.0, 10.0), (1, 6.0, 10.0)]
    assert timeline.makespan_s == 10.0


def test_a_program_that_waits_for_ever_is_refused_at_the_instruction() -> None:
    layout = chain(1, 1)
    instructions = program_of("forward-only", layout, 1).workers
    broken = Program("broken", layout, 1, ((instructions[0][0],), instructions[1]))
    with pytest.raises(PlanError, match=r"worker 1 waits for ever at F\(stage 1, microbatch 0\)"):
        simulate(broken, uniform(2, 1.0, 1.0))


seconds = st.floats(0.001, 10.0)
maybe_none = st.just(0.0) | seconds


@st.composite
def problems(draw: st.DrawFn) -> tuple[Program, StepCosts]:
    replicas = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    p = len(replicas)
    skips = tuple((a, b) for a in range(p) for b in range(a + 2, p) if draw(st.booleans()))
    name = draw(st.sampled_from(ANY_REPLICAS))
    program = program_of(name, chain(*replicas, skips=skips), draw(st.integers(1, 6)))
    costs = StepCosts(
        tuple(draw(seconds) for _ in range(p)),
        tuple(draw(seconds) for _ in range(p)),
        {pair: draw(st.floats(0.0, 1e3)) for pair in program.layout.wires},
        Link(draw(maybe_none), draw(st.floats(10.0, 1e4)), "made up"),
        draw(maybe_none),
        draw(maybe_none),
        draw(st.floats(10.0, 1e4)),
        tuple(draw(maybe_none) for _ in range(p)),
    )
    return program, costs


@property_test
@given(problems())
def test_busy_time_is_the_sum_of_what_was_computed(problem: tuple[Program, StepCosts]) -> None:
    program, costs = problem
    timeline = simulate(program, costs)
    for worker, instructions in enumerate(program.workers):
        wanted = sum(
            (costs.forward_s if i.op is Op.FORWARD else costs.backward_s)[i.stage] + costs.action_overhead_s
            for i in instructions
            if i.op in (Op.FORWARD, Op.BACKWARD)
        )
        assert timeline.busy_s(worker) == pytest.approx(wanted)


def span_of(timeline: Timeline, i: Instruction, worker: int) -> Span:
    (span,) = (s for s in timeline.spans if (s.worker, s.op, s.stage, s.microbatch) == (
        worker, i.op.value, i.stage, i.microbatch))  # fmt: skip
    return span


@property_test
@given(problems())
def test_nothing_starts_before_what_it_needs(problem: tuple[Program, StepCosts]) -> None:
    program, costs = problem
    timeline, layout = simulate(program, costs), program.layout
    for worker, instructions in enumerate(program.workers):
        ends = [(s.start_s, s.end_s) for s in timeline.spans if s.worker == worker]
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(ends)), "a worker does one thing at a time"
        for i in instructions:
            if i.op not in (Op.FORWARD, Op.BACKWARD):
                continue
            s, m, start = i.stage, i.microbatch, span_of(timeline, i, worker).start_s
            backward = i.op is Op.BACKWARD
            if backward:
                assert start >= span_of(timeline, Instruction(Op.FORWARD, s, m), worker).end_s
            for peer in layout.consumers(s, gradients=True) if backward else layout.producers(s):
                pair = (s, peer) if backward else (peer, s)
                n_bytes = costs.packet_bytes[pair]
                travel = costs.send_overhead_s + n_bytes / costs.pack_bytes_per_s + costs.link.seconds(n_bytes)
                made = span_of(timeline, Instruction(i.op, peer, m), layout.worker_of(peer, m)).end_s
                assert start >= made + travel - 1e-9


@property_test
@given(problems(), st.integers(0, 3), st.floats(0.0, 5.0), st.data())
def test_nothing_gets_faster_when_something_takes_longer(
    problem: tuple[Program, StepCosts], stage: int, more_s: float, data: st.DataObject
) -> None:
    program, costs = problem
    s = stage % program.layout.n_stages
    which = data.draw(st.sampled_from(["forward_s", "backward_s", "reduce_s", "latency", "bytes", "action_overhead_s"]))
    if which == "latency":
        slower = replace(costs, link=replace(costs.link, latency_s=costs.link.latency_s + more_s))
    elif which == "bytes":
        packets = {pair: n + more_s * (s in pair) for pair, n in costs.packet_bytes.items()}
        slower = replace(costs, packet_bytes=packets)
    elif which == "action_overhead_s":
        slower = replace(costs, action_overhead_s=costs.action_overhead_s + more_s)
    else:
        values = list(getattr(costs, which))
        values[s] += more_s
        slower = replace(costs, **{which: tuple(values)})
    assert simulate(program, slower).makespan_s >= simulate(program, costs).makespan_s - 1e-9


@property_test
@given(problems())
def test_the_makespan_is_at_least_the_busiest_worker(problem: tuple[Program, StepCosts]) -> None:
    timeline = simulate(*problem)
    assert timeline.makespan_s >= max(timeline.busy_s(worker) for worker in range(timeline.n_workers)) - 1e-9
    assert 0.0 <= timeline.bubble <= 1.0


def test_workers_share_the_cores_of_their_host() -> None:
    """Three replicas on two cores: 3 s of work each at two thirds of the speed, and the last one alone at full."""
    layout = chain(3)
    costs = StepCosts((1.0,), (2.0,), {}, FREE_LINK, n_cores=2, hosts=(0, 0, 0))
    timeline = simulate(program_of("1f1b", layout, 3), costs)
    assert timeline.makespan_s == pytest.approx(3 * 3.0 / 2)
    apart = replace(costs, hosts=(0, 0, 1))
    assert simulate(program_of("1f1b", layout, 3), apart).makespan_s == pytest.approx(3.0)
    assert simulate(program_of("1f1b", layout, 3), replace(costs, beside=1.5)).makespan_s == pytest.approx(4.5)
    two = replace(costs, n_cores=3, beside=1.5)
    assert simulate(program_of("1f1b", layout, 3), two).makespan_s == pytest.approx(1.5 * 3.0)
    assert simulate(program_of("1f1b", chain(1), 1), two).makespan_s == pytest.approx(3.0), "nobody is beside it"
    last_alone = simulate(program_of("1f1b", layout, 4), costs)
    assert last_alone.makespan_s == pytest.approx(3 * 3.0 / 2 + 3.0), "the first has two microbatches"
    slowed = replace(costs, sharing=1.1)
    assert simulate(program_of("1f1b", layout, 3), slowed).makespan_s == pytest.approx(1.1 * 3 * 3.0 / 2)
    assert simulate(program_of("1f1b", layout, 3), replace(apart, sharing=1.1)).makespan_s == pytest.approx(3.0)


@property_test
@given(problems(), st.integers(1, 4))
def test_cores_bound_the_work_done_at_once(problem: tuple[Program, StepCosts], n_cores: int) -> None:
    program, costs = problem
    n_workers = len(program.workers)
    shared = simulate(program, replace(costs, n_cores=n_cores, hosts=(0,) * n_workers))
    work = sum(simulate(program, costs).busy_s(worker) for worker in range(n_workers))
    assert shared.makespan_s >= work / n_cores - 1e-9
    enough = simulate(program, replace(costs, n_cores=n_workers, hosts=(0,) * n_workers))
    assert enough.makespan_s == pytest.approx(simulate(program, costs).makespan_s)


def test_a_worker_stores_gradients_first_and_adds_them_up_from_its_second_backward_on() -> None:
    costs = replace(uniform(1, 1.0, 2.0), store_s=(0.25,), accumulate_s=(0.5,))
    assert simulate(program_of("1f1b", chain(1), 4), costs).makespan_s == pytest.approx(4 * 3.0 + 0.25 + 3 * 0.5)
    each = simulate(program_of("1f1b", chain(2), 4), costs)
    assert each.makespan_s == pytest.approx(2 * 3.0 + 0.25 + 0.5), "each its own"


def test_each_pair_of_stages_has_its_own_link() -> None:
    slow = Link(1.0, float("inf"), "made up")
    costs = replace(uniform(3, 1.0, 1.0), links={(1, 2): slow})
    assert simulate(program_of("forward-only", chain(1, 1, 1), 1), costs).makespan_s == pytest.approx(4.0)


def test_packets_of_one_channel_go_one_behind_the_other() -> None:
    """A forward takes 1 s and its packet 3 s on the link: the second of two waits for the first, latencies do not."""
    link = Link(0.5, 10.0, "made up")
    costs = replace(uniform(2, 1.0, 1.0, link), packet_bytes={(0, 1): 30.0})
    timeline = simulate(program_of("forward-only", chain(1, 1), 2), costs)
    starts = [span.start_s for span in timeline.spans if span.worker == 1]
    assert starts == pytest.approx([1.0 + 3.0 + 0.5, 1.0 + 3.0 + 3.0 + 0.5])


@pytest.mark.parametrize(
    ("reduce_s", "n_buckets", "left_s"),
    [
        (1.2, 1, 1.2),  # nothing is hidden
        (1.2, 4, 0.3),  # but for the last bucket, all is: 3/4 of the backward are as long as it
        (6.0, 4, 4.5),  # 3/4 of the backward hide as much
    ],
)
def test_buckets_of_a_reduction_hide_behind_the_last_backward(reduce_s: float, n_buckets: int, left_s: float) -> None:
    costs = replace(uniform(1, 1.0, 2.0), reduce_s=(reduce_s,), reduce_buckets=(n_buckets,))
    layout = Layout(((0, 1),), (), ())
    timeline = simulate(program_of("1f1b", layout, 2), costs)
    assert timeline.makespan_s == pytest.approx(1.0 + 2.0 + left_s)


def test_buckets_hide_behind_weight_gradients_where_these_run_apart() -> None:
    layout = Layout(((0, 2), (1, 3)), ((0, 1),), ((0, 1),))
    costs = replace(
        uniform(2, 1.0, 2.0),
        backward_input_s=(1.0, 1.0),
        backward_weight_s=(1.0, 1.0),
        reduce_s=(2.0, 2.0),
        reduce_buckets=(2, 2),
    )
    program = program_of("zb-h1", layout, 4)
    without = simulate(program, replace(costs, reduce_s=()))
    assert simulate(program, costs).makespan_s == pytest.approx(without.makespan_s + 2.0 - 0.5)
