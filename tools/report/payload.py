"""What the report's page knows: one plan, its timelines and its waiting as plain values, in columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from ...partitioner.measured_run import MeasuredRun
from ...partitioner.plan import Alternative, Plan, StageRecord
from ...partitioner.residency import memory_over_time
from ...partitioner.waiting import critical_path, waits
from ...runtime.program import Timeline
from ...runtime.schedules import TRAINING_SCHEDULES
from ..verdict import judge
from ..words import NO_LIMIT, clean, device_kinds, shape
from .tree import tree_of

_LINK_FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0)
_ALIVE = 12


@dataclass(frozen=True)
class Shown:
    """A plan to be shown: under which name, and a run of it if there is one."""

    name: str
    plan: Plan
    run: MeasuredRun | None = None

    @property
    def measured(self) -> Timeline | None:
        """Return what every worker did in the run's median step."""
        return None if self.run is None else self.run.timeline


def payload(shown: Shown) -> dict[str, Any]:
    """Return what the page shows of one plan; seconds and bytes throughout."""
    plan, timeline = shown.plan, shown.plan.predicted
    verdict, p = judge(plan, timeline), plan.prediction
    timelines = [timeline] if shown.measured is None else [timeline, shown.measured]
    return {
        "name": clean(shown.name),
        "model": clean(plan.model),
        "schedule": clean(plan.schedule),
        "microbatches": plan.n_microbatches,
        "replicas": plan.layout().n_replicas,
        "rows": plan.batch_rows,
        "fingerprint": clean(plan.fingerprint),
        "verdict": {name: clean(text) for name, text in vars(verdict).items()},
        "prediction": {"step_s": p.step_s, "bubble": p.bubble, "one_device_s": p.one_device_s, "costs": p.cost_source},
        "reasons": [clean(reason) for reason in plan.reasons],
        "devices": [clean(device) for device in plan.devices],
        "stages": [_stage(plan, stage) for stage in plan.stages],
        "graph": _graph(plan),
        "wires": _wires(plan),
        "ties": _ties(plan),
        "timelines": [_timeline(plan, each) for each in timelines],
        "memory": _memory(plan, timeline),
        "candidates": _candidates(shown.name, plan),
        "links": _links(plan),
    }


def _stage(plan: Plan, stage: StageRecord) -> dict[str, Any]:
    limited = stage.memory_limit_bytes < NO_LIMIT
    return {
        "devices": device_kinds(stage),
        "workers": list(stage.workers),
        "forward_s": stage.forward_s,
        "backward_s": stage.backward_s,
        "weight_s": stage.backward_weight_s,
        "parameter_bytes": stage.parameter_bytes,
        "saved_bytes": stage.saved_bytes,
        "in_flight": stage.in_flight,
        "device_bytes": stage.device_bytes,
        "limit_bytes": stage.memory_limit_bytes if limited else None,
        "recompute": stage.recompute,
        "kinds": sorted({clean(device.partition(":")[0]) for device in stage.devices}),
    }


def _graph(plan: Plan) -> dict[str, Any]:
    """Write the ops as columns; texts that come often are numbers of a table."""
    tree, texts = tree_of(plan), _Texts()
    place = {name: -1 - index for index, name in enumerate(plan.graph_inputs)}
    place |= {op.name: index for index, op in enumerate(plan.ops)}
    return {
        "inputs": [clean(name) for name in plan.graph_inputs],
        "names": [clean(op.name) for op in plan.ops],
        "targets": [texts.place(op.target) for op in plan.ops],
        "paths": [texts.place(op.module_path) for op in plan.ops],
        # The last part only: a page that is passed on does not tell where its author's files are.
        "sources": [texts.place(PurePath(op.source).name if op.source else "") for op in plan.ops],
        "stages": [op.stage for op in plan.ops],
        "copies": {index: list(op.copies) for index, op in enumerate(plan.ops) if op.copies},
        "forward_s": [_short(op.forward_s) for op in plan.ops],
        "backward_s": [_short(op.backward_s) for op in plan.ops],
        "output_bytes": [op.output_bytes for op in plan.ops],
        "saved_bytes": [op.saved_bytes for op in plan.ops],
        "costs": [texts.place(op.cost_source) for op in plan.ops],
        "uses": [[place[name] for name in op.inputs if name in place] for op in plan.ops],
        "nodes": [[node.kind, clean(node.label), node.parent, node.copies] for node in tree.nodes],
        "node_of": list(tree.node_of),
        "texts": texts.all,
    }


class _Texts:
    def __init__(self) -> None:
        self.all: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        if text not in self._places:
            self._places[text] = len(self.all)
            self.all.append(clean(text))
        return self._places[text]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _wires(plan: Plan) -> list[list[Any]]:
    own = [stage.workers for stage in plan.stages]
    place = {op.name: index for index, op in enumerate(plan.ops)}
    return [
        [
            place.get(wire.value, -1),
            clean(wire.value),
            wire.source,
            list(wire.targets),
            [int(own[target] != own[wire.source]) for target in wire.targets],
            wire.n_bytes,
            int(wire.gradient),
        ]
        for wire in plan.wires
    ]


def _ties(plan: Plan) -> list[list[Any]]:
    place = {op.name: index for index, op in enumerate(plan.ops)}
    return [[clean(tie.parameter), [place[name] for name in tie.ops], tie.n_bytes] for tie in plan.ties]


def _timeline(plan: Plan, timeline: Timeline) -> dict[str, Any]:
    spans = timeline.spans
    ops = list(dict.fromkeys(span.op for span in spans))
    return {
        "source": timeline.source,
        "workers": timeline.n_workers,
        "makespan_s": timeline.makespan_s,
        "bubble": timeline.bubble,
        "ops": [clean(op) for op in ops],
        "op": [ops.index(span.op) for span in spans],
        "worker": [span.worker for span in spans],
        "stage": [span.stage for span in spans],
        "microbatch": [span.microbatch for span in spans],
        "start_s": _seconds(timeline, (span.start_s for span in spans)),
        "end_s": _seconds(timeline, (span.end_s for span in spans)),
        "waits": [[w.worker, w.start_s, w.end_s, w.cause, w.awaited] for w in waits(plan, timeline)],
        "critical": critical_path(plan, timeline),
    }


def _seconds(timeline: Timeline, values: Iterable[float]) -> list[float]:
    """Write times to a millionth of the step."""
    unit = max(timeline.makespan_s, 1e-12) * 1e-6
    return [_short(round(value / unit) * unit) if value < unit * 1e4 else float(f"{value:.7g}") for value in values]


def _memory(plan: Plan, timeline: Timeline) -> list[dict[str, Any]]:
    """Write what each worker holds over the step, and what is alive where it is at its fullest."""
    found = []
    for worker, steps in memory_over_time(plan, timeline).items():
        peak_s, peak = max(steps, key=lambda step: step[1])
        own = [stage for stage in plan.stages if worker in stage.workers]
        limit = min((stage.memory_limit_bytes for stage in own), default=NO_LIMIT)
        found.append(
            {
                "worker": worker,
                "steps": _thinned(steps),
                "peak_s": peak_s,
                "peak_bytes": peak,
                "limit_bytes": limit if limit < NO_LIMIT else None,
                "alive": _alive(timeline, worker, own, peak_s),
            }
        )
    return found


def _thinned(steps: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Keep the last of the values that hold for no time."""
    last = dict(steps)
    return [[float(f"{second:.7g}"), n_bytes] for second, n_bytes in last.items()]


def _alive(timeline: Timeline, worker: int, own: Sequence[StageRecord], now: float) -> list[list[Any]]:
    """List what a worker holds at a time: its state, and the microbatches whose activations are there, by stage."""
    held: defaultdict[int, set[int]] = defaultdict(set)
    computing: tuple[str, int, int] | None = None
    for span in timeline.spans:
        if span.worker != worker or span.op not in ("F", "B", "I", "W"):
            continue
        if span.op == "F" and span.start_s <= now:
            held[span.stage].add(span.microbatch)
        if span.op in ("B", "W") and span.end_s <= now:
            held[span.stage].discard(span.microbatch)
        if span.start_s <= now < span.end_s:
            computing = (span.op, span.stage, span.microbatch)
    stage_of = {stage.index: stage for stage in own}
    listed: list[list[Any]] = [
        [f"weights, gradients and optimizer state of stage {stage.index}", stage.memory_bytes - stage.held_bytes]
        for stage in own
    ]
    for s, microbatches in sorted(held.items()):
        stage = stage_of[s]
        each = stage.input_bytes if stage.recompute else stage.saved_bytes
        names = ", ".join(map(str, sorted(microbatches)[:_ALIVE])) + (" …" if len(microbatches) > _ALIVE else "")
        if microbatches:
            what = "inputs" if stage.recompute else "activations"
            listed.append([f"{what} of microbatches {names} in stage {s}", each * len(microbatches)])
    if computing is not None:
        stage = stage_of[computing[1]]
        beside = stage.workspace_bytes + (stage.saved_bytes if stage.recompute and computing[0] != "F" else 0)
        listed.append([f"what {computing[0]} of microbatch {computing[2]} needs while it runs", beside])
    return [entry for entry in listed if entry[1]]


def _candidates(name: str, plan: Plan) -> list[dict[str, Any]]:
    """Write the chosen configuration and the others that the planner considered."""
    file = PurePath(name).name if name.endswith(".json") else "plan.json"
    own = _candidate(plan.as_alternative(), clean(f"stagecut.compile(model, devices, plan={file!r})"))
    costs = "analytic" if plan.prediction.cost_source == "analytic" else "measured"
    limit = _limit_bytes(plan)
    return [
        own | {"chosen": True},
        *(_candidate(each, _call(each, len(plan.devices), costs, limit)) for each in plan.alternatives),
    ]


def _candidate(each: Alternative, call: str) -> dict[str, Any]:
    return {
        "shape": shape(each.replicas, each.recomputed, each.n_workers),
        "schedule": clean(each.schedule),
        "microbatches": each.n_microbatches,
        "step_s": each.step_s,
        "memory_bytes": each.memory_bytes,
        "chosen": False,
        "call": call,
    }


def _limit_bytes(plan: Plan) -> int | None:
    """Return what every worker may hold; None where nothing limits them, or each has a limit of its own."""
    limits = {stage.memory_limit_bytes for stage in plan.stages}
    limit = limits.pop()
    return None if limits or not 0 < limit < NO_LIMIT else int(limit)


def _call(each: Alternative, n_devices: int, costs: str, limit_bytes: int | None) -> str:
    """Write a configuration as it is given to ``stagecut.compile``; "" where its order is in no name."""
    if each.schedule not in TRAINING_SCHEDULES:
        return ""
    replicas = list(each.replicas)
    devices = "devices" if each.n_workers == n_devices else f"devices[:{each.n_workers}]"
    parts = [f"stages={len(replicas)}"] if replicas else []
    if replicas and each.n_workers == sum(replicas):  # where devices have several stages they say the replicas
        parts.append(f"replicas={(replicas[0] if len(set(replicas)) == 1 else replicas)!r}")
    parts += [f"microbatches={each.n_microbatches}", f"schedule={each.schedule!r}", f"costs={costs!r}"]
    if len(each.recomputed) in (0, len(replicas)):  # some stages: what the planner does if it is not told
        parts.append(f"recompute={bool(each.recomputed)}")
    if limit_bytes is not None:
        parts.append(f"memory_bytes={limit_bytes}")
    return clean(f"stagecut.compile(model, {devices}, {', '.join(parts)})")


def _links(plan: Plan) -> list[list[float]]:
    """Simulate the step again with slower and faster links: factor, seconds, bubble."""
    if not plan.timing.links:
        return []
    found = []
    for factor in _LINK_FACTORS:
        links = tuple(
            replace(link, bytes_per_s=link.bytes_per_s * factor, latency_s=link.latency_s) for link in plan.timing.links
        )
        timeline = replace(plan, timing=replace(plan.timing, links=links)).predicted
        found.append([factor, timeline.makespan_s, timeline.bubble])
    return found
