"""Published schedules: complete, free of deadlock, and with the bubble and memory that their papers give."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.errors import ConstraintError
from stagecut.partitioner.cluster import Link
from stagecut.partitioner.simulate import StepCosts, simulate
from stagecut.runtime.instructions import Action, Layout
from stagecut.runtime.program import Timeline, check, lower
from stagecut.runtime.schedules.families import FAMILIES
from stagecut.runtime.schedules.placement import chain, loop, vee

property_test = settings(max_examples=150, deadline=None, derandomize=True)


def placement(name: str, p: int, chunks: int = 2) -> Layout:
    """A layout that the schedule asks for."""
    return {"chain": chain(p), "loop": loop(p, chunks), "vee": vee(p)}[FAMILIES[name].placement]


def replicated(layout: Layout, n: int) -> Layout:
    """Every stage ``n`` times, each pipeline on workers of its own."""
    p = layout.n_workers
    return Layout(
        tuple(tuple(w + r * p for r in range(n)) for (w,) in layout.workers), layout.wires, layout.gradient_wires
    )


def run(name: str, layout: Layout, m: int, f: float = 1.0, i: float = 1.0, w: float = 1.0) -> Timeline:
    n, p = layout.n_stages, layout.n_workers
    share = p / n  # a worker's stages take as long as one stage would
    costs = StepCosts(
        (f * share,) * n,
        ((i + w) * share,) * n,
        {},
        Link(0.0, float("inf"), "none"),
        backward_input_s=(i * share,) * n,
        backward_weight_s=(w * share,) * n,
    )
    return simulate(lower(name, layout, FAMILIES[name].make(layout, m), m), costs)


def peaks(name: str, p: int, m: int) -> list[float]:
    """Microbatches that each worker holds, a stage of several counted by its share."""
    layout = placement(name, p)
    timeline = run(name, layout, m)
    return [timeline.peak_in_flight(w) * p / layout.n_stages for w in range(p)]


@property_test
@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 6), st.integers(1, 4), st.integers(1, 14), st.integers(1, 3))
def test_all_is_computed_once_in_an_order_that_cannot_deadlock(
    name: str, p: int, chunks: int, m: int, n_replicas: int
) -> None:
    family = FAMILIES[name]
    m = max(m, family.least(p)) * n_replicas
    layout = replicated(placement(name, p, chunks), n_replicas)
    orders = family.make(layout, m)
    check(lower(name, layout, orders, m))
    kinds = {action.kind for order in orders for action in order}
    assert kinds == ({"F"} if not family.trains else kinds if family.splits_backward else {"F", "B"})
    for w, order in enumerate(orders):
        assert all(layout.worker_of(action.stage, action.microbatch) == w for action in order)


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.placement == "chain"])
def test_neighbouring_stages_of_a_worker_run_as_one(name: str, chunks: int) -> None:
    p, m = 3, 7
    layout = chain(p, chunks)
    orders = FAMILIES[name].make(layout, m)
    check(lower(name, layout, orders, m))
    assert run(name, layout, m).makespan_s == pytest.approx(run(name, chain(p), m).makespan_s)


@pytest.mark.parametrize("m", [8, 16, 24])
@pytest.mark.parametrize("p", [2, 4, 8])
def test_bubbles_are_those_of_the_papers(p: int, m: int) -> None:
    """Idle seconds of a step with F = 1.1, I = 1.2 and W = 0.7, or all equal where the paper says so."""

    def idle_s(name: str, layout: Layout, *times: float) -> float:
        return run(name, layout, m, *times).makespan_s - m * sum(times)

    times = (1.1, 1.2, 0.7)
    whole = (p - 1) * sum(times)
    for name in ("fill-drain", "1f1b", "eager-1f1b"):
        assert idle_s(name, chain(p), *times) == pytest.approx(whole), name
    for v in (2, 4):
        assert idle_s("interleaved-1f1b", loop(p, v), *times) == pytest.approx(whole / v)
        assert idle_s("looped-breadth-first", loop(p, v), *times) == pytest.approx(whole / v)
    assert idle_s("zb-h1", chain(p), *times) == pytest.approx((p - 1) * (1.1 + 1.2 - 0.7))
    equal = (1.0, 1.0, 1.0)
    assert idle_s("zb-h1", chain(p), *equal) == pytest.approx(p - 1)
    if m >= 2 * p - 1:
        # Nothing in the span of a worker; the last one starts p - 1 forwards after the first.
        assert run("zb-h2", chain(p), m, *equal).makespan_s == pytest.approx(3 * m + p - 1)
        assert run("zb-v", vee(p), m, *equal).makespan_s == pytest.approx(3 * m + (p - 1) / 2)


@pytest.mark.parametrize("m", [16, 32])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 6, 8, 9])
def test_memory_is_that_of_the_papers(p: int, m: int) -> None:
    assert peaks("fill-drain", p, m) == [m] * p
    assert peaks("1f1b", p, m) == [min(m, p - w) for w in range(p)]
    assert peaks("eager-1f1b", p, m) == [min(m, 2 * (p - w) - 1) for w in range(p)]
    assert peaks("zb-h1", p, m) == [min(m, p)] * p
    assert peaks("zb-h2", p, m) == [min(m, 2 * p - 1)] * p
    assert max(peaks("zb-v", p, m)) <= p
    assert max(peaks("v-half", p, m)) <= (p + 2) // 2 + 0.5
    assert max(peaks("v-min", p, m)) <= (p + 4) // 3 + 0.5
    interleaved = [min(2 * m, 2 * (p - 1 - w) + p + 1) / 2 for w in range(p)]
    if m % p == 0:
        assert peaks("interleaved-1f1b", p, m) == interleaved
    if m >= 2 * p:
        assert max(peaks("dualpipe-v", p, m)) <= p + 0.5


def test_v_schedules_trade_memory_for_idle_time() -> None:
    p, m = 8, 32
    made = [run(name, vee(p), m) for name in ("v-min", "v-half", "zb-v")]
    held = [max(timeline.peak_in_flight(w) for w in range(p)) for timeline in made]
    assert held == sorted(held)
    assert [timeline.makespan_s for timeline in made] == sorted((t.makespan_s for t in made), reverse=True)


def test_zb_h1_is_the_grid_of_its_description() -> None:
    assert [" ".join(f"{a.kind}{a.microbatch}" for a in order) for order in FAMILIES["zb-h1"].make(chain(3), 4)] == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


def test_dualpipe_v_names_the_nearest_count_that_works() -> None:
    with pytest.raises(ConstraintError, match="at least 8 microbatches, got 7") as caught:
        FAMILIES["dualpipe-v"].make(vee(4), 7)
    assert caught.value.hint == "use 8 microbatches"


@pytest.mark.parametrize(
    ("name", "layout", "why"),
    [
        ("zb-v", chain(2, 2), "2 stages per worker, placed as a vee"),
        ("1f1b", loop(2, 2), "placed as a chain"),
        ("interleaved-1f1b", vee(3), "placed as a loop"),
        ("zb-h1", Layout(((0, 1), (2,)), ((0, 1),), ((0, 1),)), "the same number of replicas"),
        ("zb-h1", Layout(((0, 1), (1, 0)), ((0, 1),), ((0, 1),)), "own the same stages"),
    ],
)
def test_other_placements_are_refused(name: str, layout: Layout, why: str) -> None:
    with pytest.raises(ConstraintError, match=why):
        FAMILIES[name].make(layout, 8)


def test_replicas_take_microbatches_in_turn() -> None:
    orders = FAMILIES["zb-h1"].make(replicated(chain(2), 2), 4)
    assert [a for a in orders[2] if a.kind == "F"] == [Action("F", 0, 1), Action("F", 0, 3)]
