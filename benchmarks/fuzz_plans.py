"""Fuzz target: the files that plans, runs, orders, costs and clusters are read from."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from fuzz_documents import Choices, folder, mutated, only_reading, text_of
from torch import nn

import stagecut
from stagecut.errors import StagecutError
from stagecut.partitioner.asked_order import order_of
from stagecut.partitioner.cluster import Cluster
from stagecut.partitioner.cluster_file import cluster_of_file
from stagecut.partitioner.cluster_spec import cluster_of_spec
from stagecut.partitioner.costs.cache import Cache
from stagecut.partitioner.cpu import calibration_file, calibration_key, kept_calibration
from stagecut.partitioner.cut import solve
from stagecut.partitioner.measured_run import measured_run, parse_run, read_plan
from stagecut.partitioner.plan import Plan, parse
from stagecut.partitioner.scheduling.files import costs_from_json, orders_from_json, scored_orders, to_csv
from stagecut.records import to_json
from stagecut.runtime.program import check, lower
from stagecut.runtime.schedules import computed_by, of_columns, of_part, shortened
from stagecut.runtime.schedules.tokens import actions_of
from stagecut.tools.solve import read_graph

_SMALL = 64  # microbatches and stages up to which a plan is simulated


def run(data: bytes) -> bool:
    """Read what the bytes make of a valid file; say whether it was accepted.

    Only a StagecutError may leave the reader; what is accepted has to be whole.
    """
    choices = Choices(data)
    names = list(TARGETS)
    return TARGETS[names[choices.number(len(names))]](choices)


def seeds() -> dict[str, bytes]:
    """Return inputs to begin with: every kind of file as it stands, and with a first mistake."""
    found = {}
    for number, name in enumerate(TARGETS):
        for first in range(4):
            found[f"{name}-{first}"] = bytes([number, first])
            found[f"{name}-{first}-raw"] = bytes([number, first, 255]) + b'{"format": 6}'
    return found


def _file(name: str, seed: str, document: Any, choices: Choices) -> str:
    """Write the document with mistakes, or bytes that are none; return the path."""
    path = folder() / name
    raw = choices.number(8) == 7
    if raw:
        text = seed.encode()
        at = choices.number(max(1, len(text)))
        path.write_bytes(choices.rest() if at % 2 else text[:at] + choices.rest() + text[at:])
    else:
        path.write_text(text_of(mutated(document, choices)), encoding="utf-8")
    return str(path)


def _reads(read: Callable[[], Any]) -> Any:
    """Return what is read, None if it is refused."""
    with only_reading():
        try:
            return read()
        except StagecutError:
            return None


@cache
def plans() -> tuple[dict[str, Any], ...]:
    """Plans of small models as JSON: a chain, replicas with a tie, split backwards, an order of its own."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.last.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.first(x))) + x

    chain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    x = torch.randn(8, 8)
    made = [
        stagecut.plan(chain, "sim:2xA100-80GB", example_inputs=(x,), stages=2, microbatches=2, schedule="1f1b"),
        stagecut.plan(Tied(), "sim:4xA100-80GB", example_inputs=(x,), stages=2, replicas=2, microbatches=2),
        stagecut.plan(chain, "sim:2xA100-80GB", example_inputs=(x,), stages=4, microbatches=3, schedule="zb-v"),
        stagecut.plan(chain, "sim:2xA100-80GB", example_inputs=(x,), stages=2, microbatches=3, schedule="search"),
    ]
    return tuple(to_json(plan) for plan in made)


@cache
def runs() -> tuple[dict[str, Any], ...]:
    """Runs of these plans, as if they had gone as predicted."""
    found = []
    for value in plans()[:2]:
        plan = parse(value)
        timeline = replace(plan.predicted, source="measured")
        found.append(to_json(measured_run(plan, timeline, [timeline.makespan_s] * 3)))
        parse_run(found[-1])  # types of records are looked up once, which compiles their names
    return tuple(found)


def _plan(choices: Choices) -> bool:
    document = choices.pick((*plans(), *runs()))
    path = _file("plan.json", "{}", document, choices)
    found = _reads(lambda: read_plan(path))
    if found is None:
        return False
    plan, measured = found
    assert parse(json.loads(json.dumps(to_json(plan), allow_nan=False))) == plan
    _use(plan)
    if measured is not None:
        json.dumps(to_json(measured), allow_nan=False)
        assert measured.step_s > 0
        assert 0 <= measured.timeline.bubble <= 1
    return True


def _use(plan: Plan) -> None:
    """Do with a plan that was accepted what is done with plans."""
    assert str(plan)
    layout = plan.layout()
    assert len(plan.devices) == len(plan.worker_bytes) == layout.n_workers
    n = plan.n_microbatches * layout.n_replicas
    if n > _SMALL or layout.n_stages > _SMALL:
        return
    own = shortened(of_columns(actions_of(plan.orders), layout), n) if plan.orders else None
    check(lower("plan", layout, own or of_part(plan.schedule, layout, n), n), computes=computed_by("plan"))
    timeline = plan.predicted
    assert timeline.makespan_s >= 0


_ORDER = [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1I0", "1F1", "1B1", "1W0"]]
_COSTS = {
    "forward_s": [1.0, 1.0], "backward_input_s": [1.0, 1.0], "backward_weight_s": [1.0, 0.5],
    "activation_bytes": [1.0, 1.0], "weight_grad_bytes": [0.5, 0.5], "memory_bytes": [9.0, None], "link_s": 0.1,
    "op_overhead_s": 0.0, "split_backward": True,
}  # fmt: skip


def _order(choices: Choices) -> bool:
    if choices.number(2):
        path = _file("order.json", json.dumps(_ORDER), choices.pick((_ORDER, {"order": _ORDER})), choices)
    else:
        path = str(folder() / "order.csv")
        text = to_csv(orders_from_json(mutated_tokens(choices)))
        (folder() / "order.csv").write_bytes(text.encode() + choices.rest())
    asked = _reads(lambda: order_of(path, None, None))
    if asked is None:
        return False
    assert orders_from_json([[f"{a.stage}{a.kind}{a.microbatch}" for a in order] for order in asked.orders])
    assert asked.n_stages == len({action.stage for order in asked.orders for action in order})
    return True


def mutated_tokens(choices: Choices) -> list[list[str]]:
    """Return the order with some computations changed to others."""
    rows = [list(row) for row in _ORDER]
    for _ in range(choices.number(4)):
        row = choices.pick(rows)
        row[choices.number(len(row))] = f"{choices.number(4)}{choices.pick('FBIW')}{choices.pick((0, 1, 2, 10**8))}"
    return rows


def _costs(choices: Choices) -> bool:
    path = _file("costs.json", json.dumps(_COSTS), _COSTS, choices)
    try:
        value = json.loads((folder() / "costs.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return _reads(lambda: _read_json(path)) is not None
    tokens = mutated_tokens(choices) if choices.number(2) else _ORDER
    scored = _reads(lambda: scored_orders("order", costs_from_json(value), orders_from_json(tokens)))
    if scored is None:
        return False
    assert scored.makespan_s >= scored.lower_bound_s * (1 - 1e-9)
    return True


def _read_json(path: str) -> Any:
    from pathlib import Path

    from stagecut.tools.json_file import read_json

    return read_json(Path(path))


_CLUSTER = {
    "kinds": {"Fast": {"flops_per_s": {"float32": 2e13}, "bytes_per_s": 1e12, "memory_gib": 16, "source": "made up"}},
    "hosts": [{"devices": {"Fast": 2, "A100-80GB": 1}, "count": 2, "link": {"bytes_per_s": 1e11, "latency_s": 1e-5}}],
    "between": {"bytes_per_s": 1e10, "latency_s": 2e-5},
}


def _toml(value: Any) -> str:
    """Write an inline TOML value; what TOML has no words for as JSON does, which the reader then refuses."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return text_of(value)


def _cluster(choices: Choices) -> bool:
    path = folder() / "cluster.toml"
    if choices.number(8) == 7:
        path.write_bytes(choices.rest())
    else:
        value = mutated(_CLUSTER, choices)
        lines = [f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    cluster = _reads(lambda: cluster_of_file(str(path)))
    return cluster is not None and _is_cluster(cluster)


def _spec(choices: Choices) -> bool:
    sizes = ("1", "2", "0", "00", "8", "999999999999", "9" * 400, "²", "٣", "-1", "")
    hosts, kinds = ("", "4x", "0x", "99999999x"), ("A100", "V100", "H100", "cpu", "Nothing")
    memories = ("", "-80GB", "-0GB", f"-{'9' * 400}GB")
    parts = [
        f"{choices.pick(hosts)}{choices.pick(sizes)}x{choices.pick(kinds)}{choices.pick(memories)}"
        for _ in range(1 + choices.number(2))
    ]
    text = "sim:" + "+".join(parts) + choices.rest().decode("utf-8", "replace")
    cluster = _reads(lambda: cluster_of_spec(text))
    return cluster is not None and _is_cluster(cluster)


def _is_cluster(cluster: Cluster) -> bool:
    assert cluster.devices
    assert len({device.name for device in cluster.devices}) == len(cluster.devices)
    for device in cluster.devices[:4]:
        assert 0 < device.kind.memory_bytes < math.inf
        assert all(0 < rate < math.inf for rate in device.kind.flops_per_s.values())
    return True


_GRAPH = {
    "graph": {
        "devices": [{"name": "d0", "kind": "cpu", "memory_bytes": 100}, {"name": "d1", "kind": "cpu"}],
        "transfers": [{"nodes": ["a", "b"], "seconds": 0.5}],
        "together": [["b", "c"]],
    },
    "nodes": [
        {"id": "a", "compute_s": {"cpu": 1.0}, "memory_bytes": 10},
        {"id": "b", "compute_s": {"cpu": 2.0}, "kinds": ["cpu"], "stash_bytes": 1, "pin": "d1"},
        {"id": "c", "compute_s": {"cpu": 1.0}},
    ],
    "edges": [{"source": "a", "target": "b"}, {"source": "b", "target": "c"}],
}


def _graph(choices: Choices) -> bool:
    path = _file("graph.json", json.dumps(_GRAPH), _GRAPH, choices)
    from pathlib import Path

    cut = _reads(lambda: solve(read_graph(Path(path)), time_limit_s=0.5))
    if cut is None:
        return False
    assert cut.max_load >= cut.lower_bound * (1 - 1e-9)
    assert set(cut.device_of.values()) <= set(cut.load_of)
    return True


def _caches(choices: Choices) -> bool:
    """A cache that cannot be read is no error: it is measured again."""
    before = os.environ.get("STAGECUT_CACHE")
    os.environ["STAGECUT_CACHE"] = str(folder())
    try:
        cache = Cache()
        entries = {"linear": [1e-3, 2e-3, 1e-3, 1.0, 1.0], "relu": [1e-4, 2e-4, 0.0, 1.0, 1.0]}
        _file(cache.path.name, json.dumps(entries), entries, choices)
        kind = {"flops_per_s": {"float32": 1e10}, "bytes_per_s": 1e9, "kernel_overhead_s": 1e-6, "seconds": 1.0}
        known = {calibration_key(): kind}
        _file(calibration_file().name, json.dumps(known), known, choices)
        with only_reading():
            found, calibrated = Cache(), kept_calibration()
        assert all(math.isfinite(s) and s >= 0 for entry in found.known.values() for s in entry), found.known
        if calibrated is not None:
            assert all(0 < rate < math.inf for rate in calibrated.flops_per_s.values())
        found.save()
        return bool(found.known) and calibrated is not None
    finally:
        os.environ.pop("STAGECUT_CACHE")
        if before is not None:
            os.environ["STAGECUT_CACHE"] = before


assert tomllib  # what clusters are read with is imported before anything is watched
TARGETS: dict[str, Callable[[Choices], bool]] = {
    "plan": _plan,
    "plan again": _plan,  # most of what is read is plans
    "order": _order,
    "costs": _costs,
    "cluster": _cluster,
    "spec": _spec,
    "graph": _graph,
    "caches": _caches,
}
