"""How long nothing may move: what the user gave, or what follows from the steps that were seen."""

from __future__ import annotations

import pytest

from stagecut.runtime.deadlines import COMPILE_S, LEAST_S, START_S, Deadlines


def test_before_the_first_step_it_follows_the_prediction() -> None:
    assert Deadlines().of("a") == START_S
    assert Deadlines(predicted_s=7.0).of("a") == 140.0
    assert Deadlines(compiles=True).of("a") == COMPILE_S


def test_after_some_steps_it_is_twenty_times_their_median_for_each_program() -> None:
    deadlines = Deadlines()
    for step_s in (50.0, 2.0, 3.0, 4.0):  # the first is not counted
        deadlines.note("a", step_s)
    assert deadlines.of("a") == pytest.approx(60.0)
    assert deadlines.of("b") == START_S
    deadlines.note("b", 0.001)
    assert deadlines.of("b") == START_S  # it has seen the first alone
    deadlines.note("b", 0.001)
    assert deadlines.of("b") == LEAST_S


def test_stages_that_are_compiled_may_be_compiled_again_in_any_step() -> None:
    deadlines = Deadlines(compiles=True)
    for _ in range(3):
        deadlines.note("a", 0.1)
    assert deadlines.of("a") == COMPILE_S


def test_new_workers_have_the_time_of_a_first_step() -> None:
    deadlines = Deadlines()
    for _ in range(3):
        deadlines.note("a", 0.1)
    assert deadlines.of("a") == LEAST_S
    deadlines.forget()
    assert deadlines.of("a") == START_S


def test_what_the_user_gave_holds() -> None:
    deadlines = Deadlines(2.0, 100.0)
    deadlines.note("a", 50.0)
    deadlines.note("a", 50.0)
    assert deadlines.of("a") == 2.0
    assert deadlines.start_s == START_S
