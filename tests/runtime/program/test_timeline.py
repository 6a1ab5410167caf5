"""Timelines: what can be read off spans."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.runtime.instructions import Action
from stagecut.runtime.program import Span, Timeline
from stagecut.runtime.program.timeline import order_grid

property_test = settings(max_examples=100, deadline=None, derandomize=True)


def spans(worker: int, *parts: tuple[str, int, float, float]) -> list[Span]:
    return [Span(worker, op, worker, m, start, end) for op, m, start, end in parts]


TWO = Timeline(
    "simulated",
    2,
    tuple(
        spans(0, ("F", 0, 0, 1), ("send activation", 0, 1, 2), ("F", 1, 2, 3), ("B", 0, 6, 8), ("B", 1, 8, 10))
        + spans(1, ("F", 0, 2, 3), ("B", 0, 3, 5), ("F", 1, 5, 6), ("B", 1, 6, 8))
    ),
)


def test_the_makespan_ends_with_the_last_span_of_any_kind() -> None:
    assert TWO.makespan_s == 10
    assert Timeline("measured", 1, (Span(0, "reduce", 0, -1, 2.0, 5.0),)).makespan_s == 5.0


def test_only_computes_are_busy_time() -> None:
    assert [TWO.busy_s(worker) for worker in range(2)] == [6, 6]
    assert TWO.bubble == pytest.approx(1 - 12 / 20)


def test_microbatches_are_in_flight_from_the_start_of_the_forward_to_the_end_of_the_backward() -> None:
    assert [TWO.peak_in_flight(worker) for worker in range(2)] == [2, 1]


def test_a_backward_that_ends_when_a_forward_starts_makes_room_for_it() -> None:
    line = Timeline("simulated", 1, tuple(spans(0, ("F", 0, 0, 1), ("B", 0, 1, 2), ("F", 1, 2, 3), ("B", 1, 3, 4))))
    assert line.peak_in_flight(0) == 1


def test_an_empty_timeline_has_no_time_and_no_bubble() -> None:
    empty = Timeline("measured", 3, ())
    assert (empty.makespan_s, empty.bubble, empty.peak_in_flight(0), empty.grid()) == (0.0, 0.0, 0, "")


def test_the_grid_draws_one_worker_a_line() -> None:
    assert TWO.grid(10).splitlines() == ["worker 0   0.1...aabb", "worker 1   ..0aa1bb.."]


def test_the_grid_draws_a_worker_without_spans() -> None:
    line = Timeline("measured", 2, tuple(spans(1, ("F", 0, 0, 1))))
    assert line.grid(4).splitlines() == ["worker 0   ....", "worker 1   0000"]


times = st.floats(0, 1e3, allow_nan=False)
some_spans = st.lists(
    st.builds(
        lambda worker, op, m, start, length: Span(worker, op, 0, m, start, start + length),
        st.integers(0, 2),
        st.sampled_from(["F", "B", "reduce", "send gradient"]),
        st.integers(0, 30),
        times,
        times,
    ),
    max_size=12,
)


@property_test
@given(some_spans, st.integers(1, 100))
def test_every_row_of_the_grid_has_the_width_asked_for(drawn: list[Span], columns: int) -> None:
    line = Timeline("measured", 3, tuple(drawn))
    rows = line.grid(columns).splitlines()
    assert len(rows) == (3 if line.makespan_s else 0)
    assert all(len(row) == len("worker 0   ") + columns for row in rows)


def test_orders_print_one_worker_a_line() -> None:
    orders = ((Action("F", 0, 0), Action("B", 0, 0)), (Action("F", 1, 0),))
    assert order_grid(orders).splitlines() == ["worker 0   F0.0 B0.0", "worker 1   F1.0"]
