"""Replicas, 1F1B, recomputation, shared bytes and workspace in the cut, each against brute force on small DAGs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import networkx as nx
import pytest
from brute_cut import Case, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagecut.errors import ConstraintError, InfeasibleError
from stagecut.partitioner import CutDevice, solve

KINDS = ("gpu", "cpu")
property_test = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

seconds = st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.5, 0.1, 7.0])
sizes = st.sampled_from([0.0, 0.0, 1.0, 2.0, 5.0])


@st.composite
def graphs(draw: st.DrawFn, n: int, device_names: Sequence[str]) -> nx.DiGraph:
    names = draw(st.permutations(range(n)))
    graph = nx.DiGraph()
    for v in names:
        graph.add_node(v, compute_s={kind: draw(seconds) for kind in KINDS})
        for name in draw(st.sets(st.sampled_from(["memory", "stash", "workspace", "gradient"]))):
            graph.nodes[v][f"{name}_bytes"] = draw(sizes)
        if draw(st.booleans()):
            graph.nodes[v]["forward_s"] = {kind: draw(seconds) for kind in KINDS}
    arcs = [(u, v) for i, u in enumerate(names) for v in names[i + 1 :]]
    graph.add_edges_from(draw(st.lists(st.sampled_from(arcs), max_size=2 * n))) if arcs else None
    some = st.lists(st.sampled_from(names), min_size=1, max_size=3)
    nets = [[v, *graph.successors(v)] for v in names] + draw(st.lists(some, max_size=2))
    graph.graph["transfers"] = [{"nodes": net, "seconds": draw(seconds), "bytes": draw(sizes)} for net in nets]
    graph.graph["shared"] = [
        {"nodes": nodes, "memory_bytes": draw(sizes), "stash_bytes": draw(sizes), "gradient_bytes": draw(sizes)}
        for nodes in draw(st.lists(some, max_size=3))
    ]
    if draw(st.booleans()):
        graph.graph["all_reduce"] = {
            "bytes_per_s": draw(st.sampled_from([1.0, 4.0])),
            "latency_s": draw(st.sampled_from([0.0, 0.5])),
            "overlapped": draw(st.booleans()),
            "per": draw(st.integers(1, 4)),
        }
    if draw(st.integers(0, 2)) == 0:
        graph.nodes[draw(st.sampled_from(names))]["kinds"] = [draw(st.sampled_from(KINDS))]
        graph.nodes[draw(st.sampled_from(names))]["pin"] = draw(st.sampled_from(device_names))
        graph.graph["together"] = draw(st.lists(st.lists(st.sampled_from(names), min_size=2, max_size=2), max_size=1))
    return graph


@st.composite
def cases(draw: st.DrawFn, most_nodes: int = 8, most_devices: int = 4, most_splits: int = 1100) -> Case:
    k = draw(st.integers(1, most_devices))
    n = draw(st.integers(1, min(most_nodes, int(math.log(most_splits) / math.log(max(k, 2)) + 1e-9))))
    kinds, limits = st.sampled_from(KINDS), st.sampled_from([None, None, 5.0, 9.0, 14.0, 20.0, 30.0])
    alike, same_limit = draw(st.booleans()), draw(limits)
    devices = [
        CutDevice(
            f"d{i}",
            "gpu" if alike else draw(kinds),
            same_limit if alike else draw(st.sampled_from([same_limit, draw(limits)])),
            alike or draw(st.sampled_from([True, True, False])),
        )
        for i in range(k)
    ]
    ordered, max_replicas = draw(st.booleans()), draw(st.sampled_from([1, 2, 2, 3, 4]))
    least = -(-k // max_replicas) if ordered else 1
    n_stages = draw(st.sampled_from([None, None, draw(st.integers(least, k))]))
    in_flight = draw(st.sampled_from([None, "1f1b", [draw(st.integers(0, 4)) for _ in range(n_stages or k)]]))
    return Case(
        graph=draw(graphs(n, [device.name for device in devices])),
        devices=devices,
        ordered=ordered,
        n_stages=n_stages,
        max_replicas=max_replicas,
        in_flight=in_flight,
        n_microbatches=draw(st.integers(1, 6)) if in_flight == "1f1b" else None,
        recompute=draw(st.sampled_from(["never", "choose", "always"])),
    )


@settings(property_test, max_examples=200)
@given(cases())
def test_any_combination_of_options_equals_brute_force(case: Case) -> None:
    check(case)


@settings(property_test, max_examples=40)
@given(cases(most_nodes=12, most_devices=2, most_splits=4096))
def test_up_to_twelve_nodes_equal_brute_force(case: Case) -> None:
    check(case)


@settings(property_test, max_examples=80)
@given(cases(), st.integers(1, 12))
def test_bound_holds_when_downsets_run_out(case: Case, most: int) -> None:
    check(case, max_downsets=most)


def chain(n: int, **attributes: float) -> nx.DiGraph:
    graph = nx.path_graph(n, create_using=nx.DiGraph)
    for v in graph:
        graph.nodes[v].update(compute_s={"gpu": 1.0}, forward_s={"gpu": 0.2}, **attributes)
    graph.graph["transfers"] = [{"nodes": [v, v + 1], "seconds": 0.0, "bytes": 1.0} for v in range(n - 1)]
    return graph


def gpus(k: int, memory_bytes: float | None = None) -> list[CutDevice]:
    return [CutDevice(f"gpu:{i}", "gpu", memory_bytes) for i in range(k)]


def test_one_long_node_gets_the_replicas_that_it_needs() -> None:
    graph = chain(3)
    graph.nodes[1]["compute_s"] = {"gpu": 4.0}
    cut = solve(graph, gpus(6), ordered=True, max_replicas=4)
    assert (cut.replicas, cut.loads_s) == ((1, 4, 1), (1.0, 1.0, 1.0))
    assert cut.stage_devices == (("gpu:0",), ("gpu:1", "gpu:2", "gpu:3", "gpu:4"), ("gpu:5",))
    assert cut.device_of == {0: "gpu:0", 1: "gpu:1", 2: "gpu:5"}


@pytest.mark.parametrize(("overlapped", "load"), [(False, 1.0 + 1.5 / 2), (True, 1.0)])
def test_all_reduce_is_added_unless_it_overlaps(overlapped: bool, load: float) -> None:
    graph = chain(2, gradient_bytes=3.0)
    graph.add_edge(1, 0)
    graph.graph["all_reduce"] = {"bytes_per_s": 6.0, "latency_s": 0.5, "overlapped": overlapped, "per": 2}
    cut = solve(graph, gpus(2), ordered=True, n_stages=1, max_replicas=2)
    assert cut.loads_s == (load,)


def test_all_reduce_may_take_longer_than_all_work() -> None:
    graph = chain(2)
    graph.graph["all_reduce"] = {"bytes_per_s": 1.0, "latency_s": 100.0}
    assert solve(graph, gpus(2), ordered=True, n_stages=1, max_replicas=2).loads_s == (101.0,)


def test_replicas_are_not_used_where_adding_up_gradients_is_dear() -> None:
    graph = chain(4, gradient_bytes=100.0)
    assert max(solve(graph, gpus(2), max_replicas=2).replicas) == 2
    graph.graph["all_reduce"] = {"bytes_per_s": 1.0}
    assert solve(graph, gpus(2), max_replicas=2).replicas == (1, 1)


def test_stages_on_devices_that_differ_are_not_replicas_of_each_other() -> None:
    devices = [CutDevice("a", "gpu", 10.0), CutDevice("b", "gpu", 20.0), CutDevice("c", "gpu", 20.0)]
    cut = solve(chain(3), devices, max_replicas=3, n_stages=1)
    assert cut.stage_devices == (("b", "c"),)
    with pytest.raises(ConstraintError, match="uses all of them for 1 stages"):
        solve(chain(3), devices, ordered=True, max_replicas=3, n_stages=1)


def test_pinned_device_has_no_replica() -> None:
    graph = chain(4)
    graph.nodes[0]["pin"] = "gpu:0"
    cut = solve(graph, gpus(3), ordered=True, max_replicas=3)
    assert cut.stage_devices == (("gpu:0",), ("gpu:1", "gpu:2"))


def test_number_of_stages_is_kept_though_fewer_would_do() -> None:
    graph = chain(4)
    for net in graph.graph["transfers"]:
        net["seconds"] = 9.0
    assert len(solve(graph, gpus(4)).order) == 1
    assert len(solve(graph, gpus(4), n_stages=3).order) == 3


def test_early_stages_of_1f1b_hold_more_microbatches() -> None:
    cut = solve(chain(8, stash_bytes=1.0), gpus(4, 12.0), in_flight="1f1b", n_microbatches=3, n_stages=4)
    sizes = [sum(s == stage for s in cut.stage_of.values()) for stage in range(4)]
    assert cut.memory_bytes == tuple(n * held for n, held in zip(sizes, [3, 3, 2, 1], strict=True))
    assert cut.max_load == 2.0


def test_only_the_stage_that_does_not_fit_recomputes() -> None:
    cut = solve(chain(8, stash_bytes=2.0), gpus(2, 12.0), ordered=True, in_flight=[3, 1], recompute="choose")
    assert cut.recompute == (True, False)
    assert cut.memory_bytes == (8.0, 8.0)
    assert cut.loads_s == (4.8, 4.0)


def test_input_that_two_nodes_of_a_stage_take_is_kept_once() -> None:
    graph = chain(3, stash_bytes=4.0)
    graph.add_edge(0, 2)
    graph.graph["transfers"] = [{"nodes": [0, 1, 2], "seconds": 0.0, "bytes": 3.0}]
    graph.graph["together"] = [[1, 2]]
    cut = solve(graph, gpus(2, 20.0), ordered=True, in_flight=[4, 4], recompute="always")
    assert cut.memory_bytes == (4.0, 8.0 + 4 * 3.0)
    with pytest.raises(InfeasibleError, match="20 bytes on 'gpu:1', 1 more than its 19"):
        solve(graph, gpus(2, 19.0), ordered=True, in_flight=[4, 4], recompute="always")


def test_shared_bytes_count_once_per_stage_and_workspace_once_at_its_largest() -> None:
    graph = chain(4, workspace_bytes=2.0)
    graph.nodes[0]["workspace_bytes"] = 5.0
    graph.graph["shared"] = [{"nodes": [0, 1, 3], "memory_bytes": 10.0}]
    assert solve(graph, gpus(2, 15.0), ordered=True).memory_bytes == (15.0, 12.0)
    with pytest.raises(InfeasibleError, match=r"15 bytes on 'gpu:0', 1 more than its 14"):
        solve(graph, gpus(2, 14.0), ordered=True)


def test_shared_stash_counts_per_microbatch_in_flight() -> None:
    graph = chain(2)
    graph.graph["shared"] = [{"nodes": [0, 1], "stash_bytes": 10.0}]
    assert solve(graph, gpus(1, 20.0), in_flight=[2]).memory_bytes == (20.0,)
    with pytest.raises(InfeasibleError, match="20 bytes on 'gpu:0', 5 more than its 15"):
        solve(graph, gpus(1, 15.0), in_flight=[2])


def test_idle_node_in_a_stage_of_its_own_may_keep_microbatches_off_the_others() -> None:
    graph = chain(2, stash_bytes=4.0)
    graph.nodes[0].update(compute_s={"gpu": 0.0}, stash_bytes=0.0)
    assert solve(graph, gpus(2, 5.0), in_flight=[2, 1]).stage_of == {0: 0, 1: 1}


def hint_of(**arguments: Any) -> str:
    with pytest.raises(InfeasibleError) as caught:
        solve(**arguments)
    assert "no cut fits in memory" in str(caught.value)
    return str(caught.value.hint)


def test_misfit_advises_recomputation_where_it_helps() -> None:
    problem: dict[str, Any] = {"graph": chain(4, stash_bytes=4.0), "devices": gpus(2, 12.0), "in_flight": [2, 2]}
    assert "pass recompute='choose'" in hint_of(**problem)
    assert solve(**problem, recompute="choose").memory_bytes == (8.0, 10.0)
    for net in problem["graph"].graph["transfers"]:
        net["bytes"] = 9.0
    assert "recompute" not in hint_of(**problem | {"graph": chain(4, stash_bytes=9.0, workspace_bytes=5.0)})


def test_misfit_advises_as_many_microbatches_as_fit() -> None:
    problem: dict[str, Any] = {"graph": chain(4, stash_bytes=4.0), "devices": gpus(4, 11.0), "in_flight": "1f1b"}
    assert "pass n_microbatches=2" in hint_of(**problem, n_microbatches=8)
    assert max(solve(**problem, n_microbatches=2).memory_bytes) <= 11.0
    assert "hold at most 2 microbatches" in hint_of(**problem | {"in_flight": [4, 3, 3, 3]})


def test_misfit_advises_more_devices_and_stages() -> None:
    problem: dict[str, Any] = {"graph": chain(6, memory_bytes=4.0), "max_replicas": 2}
    assert "use 3 devices for 3 stages" in hint_of(**problem, devices=gpus(2, 8.0), n_stages=2)
    assert solve(**problem, devices=gpus(3, 8.0), n_stages=3).replicas == (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_replicas": 0}, "max_replicas"),
        ({"n_stages": 0}, "1 to 3"),
        ({"n_stages": 4}, "1 to 3"),
        ({"n_stages": 1, "ordered": True, "max_replicas": 2}, "2 to 3"),
        ({"in_flight": "gpipe"}, "'1f1b'"),
        ({"in_flight": "1f1b"}, "n_microbatches"),
        ({"n_microbatches": 4}, "no effect"),
        ({"in_flight": [1, 1, 1], "n_stages": 2}, r"\(2\)"),
        ({"recompute": "sometimes"}, "recompute"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConstraintError, match=match):
        solve(chain(3), gpus(3), **options)


@pytest.mark.parametrize(
    "attributes",
    [
        {"shared": [{"nodes": [0, 7], "memory_bytes": 1.0}]},
        {"shared": [{"nodes": [], "memory_bytes": 1.0}]},
        {"shared": [{"nodes": [0], "stash_bytes": -1.0}]},
        {"all_reduce": {"bytes_per_s": 0.0}},
        {"all_reduce": {"latency_s": 1.0}},
        {"all_reduce": {"bytes_per_s": 1.0, "latency_s": -1.0}},
        {"transfers": [{"nodes": [0, 1], "seconds": 1.0, "bytes": math.nan}]},
    ],
)
def test_attributes_out_of_range_are_refused(attributes: dict[str, Any]) -> None:
    graph = chain(3)
    graph.graph.update(attributes)
    with pytest.raises(ConstraintError):
        solve(graph, gpus(3), max_replicas=2, recompute="choose")


def test_sixty_four_devices_with_replicas_and_1f1b_are_proven() -> None:
    graph = chain(120, stash_bytes=1.0, gradient_bytes=1.0)
    for v in graph:
        graph.nodes[v]["compute_s"] = {"gpu": 1.0 + v * 37 % 11 / 10}
    graph.graph["all_reduce"] = {"bytes_per_s": 20.0}
    cut = solve(graph, gpus(64, 60.0), max_replicas=8, in_flight="1f1b", n_microbatches=64)
    assert cut.optimal
    assert max(cut.replicas) > 1


def test_cut_is_imported_without_torch() -> None:
    code = "import sys, stagecut.partitioner; stagecut.partitioner.solve; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
