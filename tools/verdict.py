"""What a plan means in a few sentences: the step, its limit, the cut, the waiting, the memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..partitioner.plan import Plan, StageRecord, WireRecord
from ..partitioner.waiting import CAUSES, waits
from ..runtime.program import Span, Timeline
from .words import count, duration, memory, share, size

_ALMOST_FULL = 0.9
_CAUSES = 3
# What a worker waits for, after "waits"; by partitioner.waiting.CAUSES.
WAITING_FOR = {
    "filling": "until the first microbatch comes",
    "draining": "after the last work",
    "another stage": "until another stage has computed",
    "a transfer": "for a packet on its way",
    "replicas": "for the other replicas' gradients",
    "the runtime": "until the runtime goes on",
}


@dataclass(frozen=True)
class Verdict:
    """One short sentence per question that a reader has."""

    step: str
    limit: str
    one_device: str
    data_parallel: str
    cut: str
    crossing: str
    waiting: str
    fit: str

    def line(self) -> str:
        """Join what decides: the step, what limits it, and one device and data parallelism for comparison."""
        return "; ".join(filter(None, (self.step, self.limit, self.one_device, self.data_parallel)))


def judge(plan: Plan, timeline: Timeline) -> Verdict:
    """Say what ``plan`` means, from its own numbers and its ``timeline``."""
    p = plan.prediction
    return Verdict(
        step=f"predicted step {duration(p.step_s)} ({p.cost_source} costs), bubble {share(p.bubble)}, {_order(plan)}",
        limit=_limit(plan),
        one_device=_one_device(plan),
        data_parallel=_data_parallel(plan),
        cut=_cut(plan),
        crossing=_crossing(plan),
        waiting=_waiting(plan, timeline),
        fit=_fit(plan),
    )


def stage_load_s(stage: StageRecord) -> float:
    """Return the seconds of compute that one microbatch takes of a stage's time, which its replicas share."""
    return (stage.forward_s + stage.backward_s) / len(stage.devices)


def slowest_stage(plan: Plan) -> StageRecord:
    """Return the stage with the largest load."""
    return max(plan.stages, key=stage_load_s)


def occupied(timeline: Timeline, worker: int) -> list[Span]:
    """List what keeps a worker busy, in order of time; what takes no time is left out."""
    spans = [span for span in timeline.spans if span.worker == worker and span.end_s > span.start_s]
    return sorted(spans, key=lambda span: (span.start_s, span.end_s))


def idle_s(timeline: Timeline, worker: int) -> float:
    """Return the seconds in which a worker neither computes nor sends nor reduces."""
    idle = until = 0.0
    for span in occupied(timeline, worker):
        idle += max(0.0, span.start_s - until)
        until = max(until, span.end_s)
    return idle + max(0.0, timeline.makespan_s - until)


def stages_of(plan: Plan, worker: int) -> str:
    """Name the stages of a worker.

    ``stage 3``, or ``stages 0, 3`` where it has several.
    """
    own = [str(stage.index) for stage in plan.stages if worker in stage.workers]
    return f"stage{'s' if len(own) > 1 else ''} {', '.join(own)}"


def bytes_into(plan: Plan, stage: int) -> int:
    """Count the bytes that one microbatch's forward brings into ``stage`` from other devices."""
    return sum(wire.n_bytes for wire in plan.wires if stage in sent_to(plan, wire))


def sent_to(plan: Plan, wire: WireRecord) -> tuple[int, ...]:
    """List the stages on other devices that a value goes to."""
    own = plan.stages[wire.source].workers
    return tuple(stage for stage in wire.targets if plan.stages[stage].workers != own)


def _order(plan: Plan) -> str:
    pieces = count(plan.n_microbatches, "microbatch", "microbatches")
    if plan.layout().n_replicas > 1:
        pieces += " a replica"
    return f"{plan.schedule}, {pieces}, {count(plan.batch_rows, 'row')}"


def _limit(plan: Plan) -> str:
    stage = slowest_stage(plan)
    if len(plan.stages) == 1:
        return "one stage, no cut"
    mean = sum(map(stage_load_s, plan.stages)) / len(plan.stages)
    over = stage_load_s(stage) / mean - 1 if mean else 0.0
    balance = "all stages equal" if over < 0.005 else f"{share(over)} above the mean"
    shared = f" over {len(stage.devices)} replicas" if len(stage.devices) > 1 else ""
    return f"limited by stage {stage.index}, {duration(stage_load_s(stage))} a microbatch{shared} ({balance})"


def _one_device(plan: Plan) -> str:
    step_s, one_s = plan.prediction.step_s, plan.prediction.one_device_s
    if min(step_s, one_s) <= 0:
        return "nothing to compare with one device"
    if one_s < step_s:
        return f"ONE DEVICE IS FASTER: {duration(one_s)}, {step_s / one_s:.2f} times as fast"
    return f"one device takes {duration(one_s)}, {one_s / step_s:.2f} times as long"


def _data_parallel(plan: Plan) -> str:
    """Compare with the fastest plan that was considered of one stage with a replica on every device."""
    workers, step_s = len(plan.devices), plan.prediction.step_s
    if len(plan.stages) == 1 or workers == 1:
        return "this is data parallelism" if workers > 1 else ""
    others = [other.step_s for other in plan.alternatives if other.replicas == (workers,)]
    if not others or min(step_s, *others) <= 0:
        return "data parallelism was not considered"
    other_s = min(others)
    if other_s < step_s:
        return f"DATA PARALLELISM IS FASTER: {duration(other_s)}, {step_s / other_s:.2f} times as fast"
    return f"data parallelism takes {duration(other_s)}, {other_s / step_s:.2f} times as long"


def _cut(plan: Plan) -> str:
    p = plan.prediction
    if len(plan.stages) == 1:
        return f"1 stage of {count(len(plan.ops), 'op')}"
    if p.optimal:
        proof = "no cut has less (proven)"
    elif p.lower_bound_s > 0:
        proof = f"proven at most {share(p.bottleneck_s / p.lower_bound_s - 1)} above the least"
    else:
        proof = "without a proven bound"
    return f"{len(plan.ops)} ops; bottleneck {duration(p.bottleneck_s)} a microbatch with transfers, {proof}"


def _crossing(plan: Plan) -> str:
    crossing = [(wire, len(sent_to(plan, wire))) for wire in plan.wires if sent_to(plan, wire)]
    if not crossing:
        return f"nothing crosses between {'devices' if plan.wires else 'stages'}{_tied(plan)}"
    most = max(range(len(plan.stages)), key=lambda stage: bytes_into(plan, stage))
    total = sum(wire.n_bytes * times for wire, times in crossing)
    back = sum(wire.n_bytes * times for wire, times in crossing if wire.gradient)
    return (
        f"{count(len(crossing), 'value')}, {size(total)} forward and {size(back)} back a microbatch; "
        f"most into stage {most}: {size(bytes_into(plan, most))}{_tied(plan)}"
    )


def _tied(plan: Plan) -> str:
    """Say what is summed once a step since several stages use it."""
    if not plan.ties:
        return ""
    stage_of = plan.stage_of
    stages = sorted({stage_of[name] for tie in plan.ties for name in tie.ops})
    what = f"gradients of {count(len(plan.ties), 'tied parameter')}, {size(sum(tie.n_bytes for tie in plan.ties))}"
    return f"; {what}, are summed over stages {', '.join(map(str, stages))} once a step"


def _waiting(plan: Plan, timeline: Timeline) -> str:
    idle = [idle_s(timeline, w) for w in range(timeline.n_workers)]
    if not idle or timeline.makespan_s <= 0:
        return "nothing runs"
    worker = max(range(len(idle)), key=idle.__getitem__)
    low, high = min(idle) / timeline.makespan_s, max(idle) / timeline.makespan_s
    most = f"worker {worker} ({stages_of(plan, worker)}) waits longest, {duration(idle[worker])}"
    return f"workers wait {share(low)} to {share(high)} of the step, {most}{_causes(plan, timeline)}{_filling(plan)}"


def _causes(plan: Plan, timeline: Timeline) -> str:
    """Say what they wait for, as shares of all workers' time, most first."""
    total = timeline.makespan_s * timeline.n_workers
    seconds = dict.fromkeys(CAUSES, 0.0)
    for wait in waits(plan, timeline):
        seconds[wait.cause] += wait.end_s - wait.start_s
    found = sorted(((s / total, cause) for cause, s in seconds.items() if s / total >= 0.005), reverse=True)
    return "".join(f"; {share(part)} {WAITING_FOR[cause]}" for part, cause in found[:_CAUSES])


def _filling(plan: Plan) -> str:
    """Say what part of the bubble no cut can avoid: (p - 1) / (m + p - 1) for p equal stages and m microbatches.

    That is so where every worker has one stage.
    """
    if len(plan.devices) < sum(len(stage.devices) for stage in plan.stages):
        return ""
    p, m = len(plan.stages), min(plan.n_microbatches, max(1, plan.batch_rows // plan.layout().n_replicas))
    return f"; filling and draining {p} equal stages is {share((p - 1) / (m + p - 1))}" if p > 1 else ""


def _fit(plan: Plan) -> str:
    stage = max(plan.stages, key=lambda stage: stage.device_bytes / max(stage.memory_limit_bytes, 1.0))
    filled = stage.device_bytes / max(stage.memory_limit_bytes, 1.0)
    word = "DOES NOT FIT" if filled > 1 else "fits, barely" if filled > _ALMOST_FULL else "fits"
    own = sum(other.workers == stage.workers for other in plan.stages)
    where = f"stage {stage.index}" if own == 1 else f"the device of {stages_of(plan, stage.workers[0])}"
    return f"{word}: fullest is {where}, {memory(stage)}"
