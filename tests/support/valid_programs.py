"""Random programs that lowering makes: every schedule, on chains, loops and Vs, with replicas, skips and lockstep."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from program_reference import BACKWARD, FORWARD, TRAIN

from stagecut.runtime.instructions import Layout, Op
from stagecut.runtime.program import Program, lower
from stagecut.runtime.schedules import ANY_REPLICAS, SCHEDULES, least_microbatches, of_part
from stagecut.runtime.schedules.families import FAMILIES
from stagecut.runtime.schedules.placement import chain, loop, vee

KIND_OF = {name: {"forward-only": FORWARD, "backward-only": BACKWARD}.get(name, TRAIN) for name in SCHEDULES}


def valid_program(random: Random) -> tuple[Program, str, frozenset[int]]:
    """Return a program, the kind of step that it is for, and its stages whose replicas wait for each other."""
    name = random.choice(tuple(SCHEDULES))
    layout, in_rounds = _layout(name, random)
    least = least_microbatches(name, layout.n_workers // layout.n_replicas)
    n = random.randint(1, min(8, max(4, 2 * layout.n_replicas) + least - 1))
    stages = range(layout.n_stages)
    in_lockstep = frozenset(s for s in stages if random.random() < 0.5) if in_rounds else frozenset()
    orders = of_part(name, layout, n, in_rounds=bool(in_lockstep))
    return lower(name, layout, orders, n, in_lockstep), KIND_OF[name], in_lockstep


def peaks(program: Program) -> tuple[int, ...]:
    """Return the most forwards that each worker holds at once."""
    found = []
    for own in program.workers:
        held, most = set[tuple[int, int]](), 0
        for i in own:
            held |= {(i.stage, i.microbatch)} if i.op is Op.FORWARD else set()
            held -= {(i.stage, i.microbatch)} if i.op is Op.FREE else set()
            most = max(most, len(held))
        found.append(most)
    return tuple(found)


def _layout(name: str, random: Random) -> tuple[Layout, bool]:
    """Place stages as the schedule wants them, and say whether all of them have the same replicas."""
    if name in ANY_REPLICAS and random.random() < 0.4:
        return _with_wires(_unequal(random), random), False
    placement = FAMILIES[name].placement if name in FAMILIES else random.choice(("chain", "loop", "vee"))
    n_workers, n_replicas = random.randint(1, 3), random.choice((1, 1, 2, 3))
    one = {"chain": chain(n_workers), "loop": loop(n_workers, 2), "vee": vee(n_workers)}[placement]
    workers = tuple(tuple(w * n_replicas + r for r in range(n_replicas)) for (w,) in one.workers)
    return _with_wires(replace(one, workers=workers), random), n_replicas > 1


def _unequal(random: Random) -> Layout:
    counts = [random.randint(1, 3) for _ in range(random.randint(1, 4))]
    firsts = [sum(counts[:s]) for s in range(len(counts))]
    return Layout(tuple(tuple(range(first, first + n)) for first, n in zip(firsts, counts)), (), ())


def _with_wires(layout: Layout, random: Random) -> Layout:
    """Wire most neighbours and some others; gradients go back on most of the wires."""
    pairs = [(a, b) for a in range(layout.n_stages) for b in range(a + 1, layout.n_stages)]
    wires = tuple((a, b) for a, b in pairs if random.random() < (0.9 if b == a + 1 else 0.3))
    return replace(layout, wires=wires, gradient_wires=tuple(wire for wire in wires if random.random() < 0.8))
