"""A worker that is busy for longer than planned, compared with the others, is reported once, with figures."""

from __future__ import annotations

import re
import warnings

import pytest
from spoiled import batch, spoiled

from stagecut.runtime.program import Span, Timeline
from stagecut.runtime.watch.slow import STEPS, SlowWorkers

pytestmark = pytest.mark.usefixtures("no_workers_left")


def watched(*planned_s: float) -> SlowWorkers:
    """Watch workers of which each is planned to compute a microbatch, send it, and wait for a reduction."""
    spans = [
        span
        for w, seconds in enumerate(planned_s)
        for span in (
            Span(w, "F", w, 0, 0.0, 0.9 * seconds),
            Span(w, "send activation", w, 0, 0.9 * seconds, seconds),
            Span(w, "reduce", w, -1, seconds, 9.0),
        )
    ]
    return SlowWorkers(lambda: Timeline("simulated", len(planned_s), tuple(spans)))


def reports(slow: SlowWorkers, *steps: tuple[float, ...], n_microbatches: int = 1) -> list[str]:
    found = [slow.look(dict(enumerate(busy)), n_microbatches, sum(busy)) for busy in steps]
    return [text for text in found if text is not None]


def test_ten_slow_steps_in_a_row_are_reported_once_with_the_figures() -> None:
    slow = watched(0.1, 0.1, 0.2)
    assert reports(slow, *[(0.2, 0.31, 0.4)] * (STEPS - 1)) == []
    (text,) = reports(slow, *[(0.2, 0.31, 0.4)] * 20)
    assert text.startswith("worker 1 is slow: busy for 310.0 ms")
    assert "200.0 ms would be in line with the other workers (planned 100.0 ms" in text
    assert "1.6 times as much, 10 steps in a row" in text or "1.5 times as much" in text


def test_of_two_workers_each_is_held_against_the_other() -> None:
    (text,) = reports(watched(0.1, 0.3), *[(0.16, 0.3)] * STEPS)
    assert text.startswith("worker 0 is slow")


@pytest.mark.parametrize(
    "steps",
    [
        [(0.3, 0.3, 0.6)] * 30,  # a machine that is three times as slow as planned
        [(0.1, 0.14, 0.2)] * 30,
        ([(0.1, 0.2, 0.2)] * 9 + [(0.1, 0.1, 0.2)]) * 3,  # never ten in a row
        [(1e-3, 5e-3, 2e-3)] * 30,  # too little to plan anew for
        [(0.1, 0.16, 0.2), (0.16, 0.1, 0.2)] * 15,  # one, then the other
    ],
)
def test_what_is_no_slow_worker_is_not_reported(steps: list[tuple[float, ...]]) -> None:
    assert reports(watched(0.1, 0.1, 0.2), *steps) == []


def test_batches_of_another_size_and_single_workers_are_not_compared() -> None:
    assert reports(watched(0.1, 0.1), *[(0.1, 0.9)] * 30, n_microbatches=2) == []
    assert reports(watched(0.1), *[(9.0,)] * 30) == []


@pytest.mark.parametrize("launch", ["local"])
def test_a_stage_that_becomes_slow_is_warned_of_and_replan_is_proposed(launch: str) -> None:
    with spoiled("spin", launch) as pm:
        x, y = batch(marked=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(STEPS + 30):  # the machine may hold the other workers up now and then
                pm.step(x, target=y)
        told = [w for w in caught if " is slow: " in str(w.message)]
        assert len(told) == 1
        assert told[0].filename == __file__
        text = str(told[0].message)
        assert re.match(rf"stagecut: worker {pm.plan.stage_of['spoil']} is slow: busy for [\d.]+ ms", text)
        assert "pm.replan(" in text
