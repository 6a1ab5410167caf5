"""Traces: what Perfetto needs to draw slices, counters, and an arrow for each packet."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from stagecut.partitioner.cluster import Link
from stagecut.partitioner.simulate import StepCosts, simulate
from stagecut.runtime.instructions import SENDS, Layout
from stagecut.runtime.program import Program, Span, Timeline, chrome_trace, lower
from stagecut.runtime.schedules import of_part

CHAIN = Layout(((0,), (1,), (2,)), ((0, 1), (1, 2)), ((0, 1), (1, 2)))
SKIP = Layout(((0,), (1,), (2,)), ((0, 1), (0, 2), (1, 2)), ((0, 1), (1, 2)))
REPLICAS = Layout(((0, 1), (2, 3)), ((0, 1),), ((0, 1),))
UNEVEN = Layout(((0, 1, 2), (3,)), ((0, 1),), ((0, 1),))
VEE = Layout(((0,), (1,), (1,), (0,)), ((0, 1), (1, 2), (2, 3)), ((0, 1), (1, 2), (2, 3)))
CASES = [
    (CHAIN, "1f1b"),
    (SKIP, "1f1b"),
    (SKIP, "fill-drain"),
    (CHAIN, "zb-h1"),
    (REPLICAS, "1f1b"),
    (UNEVEN, "1f1b"),
    (VEE, "zb-v"),
]


def step_of(layout: Layout, schedule: str, send_s: float) -> tuple[Program, Timeline]:
    n = layout.n_stages
    program = lower(schedule, layout, of_part(schedule, layout, 6), 6)
    costs = StepCosts(
        forward_s=(1.0,) * n,
        backward_s=(2.0,) * n,
        backward_input_s=(1.0,) * n,
        backward_weight_s=(1.0,) * n,
        packet_bytes=dict.fromkeys(layout.wires, 1.0),
        link=Link(0.25, 4.0, "test"),
        send_overhead_s=send_s,
    )
    return program, simulate(program, costs)


def of_kind(trace: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(json.dumps(trace))["traceEvents"] if event["ph"] == kind]


def around(slices: list[dict[str, Any]], arrow: dict[str, Any]) -> list[dict[str, Any]]:
    """List the slices that are open at an end of an arrow, as a viewer does: one that ends there is closed."""
    return [
        one
        for one in slices
        if (one["pid"], one["tid"]) == (arrow["pid"], arrow["tid"])
        and one["ts"] <= arrow["ts"] < one["ts"] + one["dur"] - 1e-6
    ]


@pytest.mark.parametrize("send_s", [0.125, 0.0])
@pytest.mark.parametrize(("layout", "schedule"), CASES)
def test_every_packet_is_an_arrow_from_what_sends_it_to_what_uses_it(
    layout: Layout, schedule: str, send_s: float
) -> None:
    program, timeline = step_of(layout, schedule, send_s)
    trace = chrome_trace(timeline, layout=layout)
    slices, starts, ends = (of_kind(trace, kind) for kind in "Xsf")
    sends = [(i, worker) for worker, own in enumerate(program.workers) for i in own if i.op in SENDS]
    assert len(starts) == len(sends) > 0
    assert {start["id"] for start in starts} == set(range(len(starts)))
    if send_s:
        assert len({(start["tid"], start["ts"]) for start in starts}) == len(starts), "each sending has its own"
    drawn: Counter[tuple[Any, ...]] = Counter()
    for start, end in zip(starts, sorted(ends, key=lambda end: end["id"])):
        assert (start["id"], start["name"], start["cat"]) == (end["id"], end["name"], end["cat"])
        assert end["bp"] == "e"
        assert start["ts"] < end["ts"]
        (source,), (target,) = around(slices, start), around(slices, end)
        assert source["cat"].startswith("send ") == bool(send_s), "without a sending, what made the packet"
        assert target["cat"] in (("forward",) if start["name"] == "activation" else ("backward", "input gradient"))
        places = (source["args"]["stage"], target["args"]["stage"], target["args"]["microbatch"])
        assert source["args"]["microbatch"] == places[2]
        drawn[start["name"], start["tid"], end["tid"], *places] += 1
    assert drawn == Counter(
        (i.op.value.removeprefix("send "), worker, i.peer_worker, i.stage, i.peer_stage, i.microbatch)
        for i, worker in sends
    )


def test_an_arrow_stands_behind_the_slices_that_it_ties() -> None:
    trace = chrome_trace(step_of(CHAIN, "1f1b", 0.1)[1], layout=CHAIN)
    kinds = [event["ph"] for event in trace["traceEvents"]]
    assert kinds.index("s") > max(at for at, kind in enumerate(kinds) if kind == "X")


def test_nothing_is_an_arrow_between_stages_of_one_worker() -> None:
    layout = Layout(((0,), (0,)), ((0, 1),), ((0, 1),))
    spans = (Span(0, "F", 0, 0, 0.0, 1.0), Span(0, "F", 1, 0, 1.0, 2.0))
    trace = chrome_trace(Timeline("measured", 1, spans), layout=layout)
    assert of_kind(trace, "s") == of_kind(trace, "f") == []


def test_a_packet_that_nobody_uses_has_no_end_and_so_no_beginning() -> None:
    spans = (Span(0, "F", 0, 0, 0.0, 1.0), Span(0, "send activation", 0, 0, 1.0, 2.0))
    trace = chrome_trace(Timeline("measured", 3, spans), layout=CHAIN)
    assert of_kind(trace, "s") == of_kind(trace, "f") == []


def test_a_measured_step_is_a_process_of_its_own_with_arrows_of_its_own() -> None:
    _, timeline = step_of(SKIP, "1f1b", 0.125)
    measured = Timeline("measured", 3, timeline.spans)
    trace = chrome_trace(timeline, {0: [(0.0, 8.0)]}, SKIP, measured)
    names = {event["pid"]: event["args"]["name"] for event in of_kind(trace, "M") if event["name"] == "process_name"}
    assert names == {0: "simulated step", 1: "measured step"}
    starts, ends = of_kind(trace, "s"), of_kind(trace, "f")
    assert len({start["id"] for start in starts}) == len(starts)
    assert {(e["id"], e["pid"]) for e in starts} == {(e["id"], e["pid"]) for e in ends}
    assert Counter(start["pid"] for start in starts)[0] == Counter(start["pid"] for start in starts)[1]
    assert {event["pid"] for event in of_kind(trace, "C")} == {0}, "what is held was not measured"


def test_without_a_layout_there_are_slices_alone() -> None:
    trace = chrome_trace(step_of(CHAIN, "1f1b", 0.1)[1])
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X"}
