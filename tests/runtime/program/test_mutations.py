"""Programs with mistakes: the checks refuse each one that would do harm, and nothing else."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from program_mutations import mutated, single_mutations
from program_reference import harm_of
from valid_programs import KIND_OF, peaks, valid_program

from stagecut.errors import PlanError
from stagecut.runtime.program import Program, check, lower
from stagecut.runtime.schedules import SCHEDULES, computed_by, least_microbatches, schedule
from stagecut.runtime.schedules.families import FAMILIES
from stagecut.runtime.schedules.placement import chain, loop, vee

_AN_INSTRUCTION = re.compile(r"(F|B|I|W|send \w+|receive \w+|free|reduce)\(stage -?\d+")
_NONE: frozenset[int] = frozenset()


def agree(
    program: Program, kind: str, in_lockstep: frozenset[int] = _NONE, max_in_flight: tuple[int, ...] | None = None
) -> bool:
    """Hold the checks against the reference, and say whether the program is accepted."""
    harm = harm_of(program, kind, in_lockstep, max_in_flight)
    try:
        check(program, computes=computed_by(program.name), max_in_flight=max_in_flight, in_lockstep=in_lockstep)
        refusal = None
    except PlanError as error:
        refusal = error.message
    assert refusal is None or _AN_INSTRUCTION.search(refusal), refusal
    assert (refusal is None) == (harm is None), f"refused for {refusal}, harmful for {harm}:\n{program}"
    return refusal is None


@settings(max_examples=400, derandomize=True)
@given(st.integers(0, 2**32))
def test_a_program_with_mistakes_is_refused_exactly_if_it_would_do_harm(seed: int) -> None:
    random = Random(seed)
    program, kind, in_lockstep = valid_program(random)
    limits = peaks(program)
    assert agree(program, kind, in_lockstep, limits)
    for _ in range(10):
        wrong = mutated(program, random, random.choice((1, 1, 1, 2, 3)))
        if wrong != program:
            event("accepted" if agree(wrong, kind, in_lockstep, limits) else "refused")


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_single_mistake_in_a_small_program_of_each_schedule(name: str) -> None:
    placement = FAMILIES[name].placement if name in FAMILIES else "chain"
    layout = {"chain": chain(2), "loop": loop(2, 2), "vee": vee(2)}[placement]
    n = max(1 if layout.n_stages > 2 else 2, least_microbatches(name, 2))
    if n > 2:
        layout = vee(1)  # dualpipe-v wants twice as many microbatches as workers
        n = least_microbatches(name, 1)
    program = lower(name, layout, schedule(name, layout, n), n)
    accepted = [agree(wrong, KIND_OF[name]) for wrong in single_mutations(program)]
    assert 0 < sum(accepted) < len(accepted) / 4
