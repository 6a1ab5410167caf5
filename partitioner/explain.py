"""Why a plan: its rivals, its limit, its cuts, and what would help, each computed and none guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..errors import InfeasibleError
from .plan import LinkRecord, Plan
from .predict import predict_column
from .wording import count, ms

_WORTH = 0.01  # changes that gain less are not worth a line


def reasons(
    plan: Plan,
    others: Sequence[Plan],
    rivals: Sequence[Plan],
    failures: Sequence[Exception],
    asked_for: bool = False,
    tried: Sequence[tuple[Plan, float]] = (),
    notes: Sequence[str] = (),
) -> tuple[str, ...]:
    """Explain the choice of ``plan``.

    Args:
        others: what else was in the choice, best first.
        rivals: one device and data parallelism where the user's wishes left them out.
        failures: why configurations were no choice.
        asked_for: recompute was the user's wish.
        tried: plans that were run, with the seconds of a step; ``plan`` is the one that was taken of them.
        notes: what else there is to say of trials.
    """
    lines = [
        *(
            _against_tried(plan, tried, [*others, *rivals], notes)
            if tried
            else [*_against(plan, others, rivals), *notes]
        ),
        *_cut(plan),
        *_recompute(plan, asked_for),
        *_unfit(plan, others, failures),
    ]
    return tuple(lines + _what_would_help(plan))


def describe_shape(plan: Plan) -> str:
    """Name stages and replicas in a few words.

    ``one device``, ``data parallel on 4 devices``, ``2 stages``, ``2 stages x 4 replicas``,
    ``2 stages of 3, 1 replicas``, ``4 stages on 2 devices``, ``4 stages on 2 devices x 2 replicas``.
    """
    return describe_groups([len(stage.devices) for stage in plan.stages], len(plan.devices))


def describe_groups(sizes: Sequence[int], n_devices: int) -> str:
    """Name stages of so many devices each, on so many devices in all, as :func:`describe_shape` does."""
    if len(sizes) == 1:
        return "one device" if sizes[0] == 1 else f"data parallel on {sizes[0]} devices"
    stages = f"{len(sizes)} stages"
    if n_devices < sum(sizes):
        stages += f" on {n_devices // sizes[0]} devices"
    if set(sizes) == {1}:
        return stages
    if len(set(sizes)) == 1:
        return f"{stages} x {sizes[0]} replicas"
    return f"{len(sizes)} stages of {', '.join(map(str, sizes))} replicas"


def advice_of(error: InfeasibleError) -> list[str]:
    """List what the cut advises, as far as a user of plans can ask for it; the cut's devices are stages here."""
    advice = []
    for line in (error.hint or "").split(", or "):
        stages = re.match(r"use (\d+) devices (?:for (\d+) stages )?\(with", line)
        raised = re.match(r"raise every limit by ([\d,]+) bytes", line)
        if stages:
            advice.append(f"make {stages[2] or stages[1]} stages of such devices")
        elif line.startswith("pass recompute='choose'"):
            advice.append("leave out recompute=")
        elif raised:
            advice.append(f"raise memory_bytes by {raised[1]}")
    return advice


def _order(plan: Plan) -> str:
    return f"{describe_shape(plan)}, {plan.schedule}, {count(plan.n_microbatches, 'microbatch')}"


def _against(plan: Plan, others: Sequence[Plan], rivals: Sequence[Plan]) -> list[str]:
    step_s = plan.prediction.step_s
    lines = []
    if others and others[0].prediction.step_s < step_s:
        gain = 1 - others[0].prediction.step_s / step_s
        cost = _what_it_takes(others[0], plan)
        lines.append(f"too close to tell: {_order(others[0])}, {gain:.1%} shorter as predicted, {cost}")
    elif others:
        lines.append(f"next best: {_order(others[0])}, {_compare(others[0].prediction.step_s, step_s)}")
    shapes = {describe_shape(plan), *(describe_shape(other) for other in others[:1])}
    return lines + _without_pipeline([*others[1:], *rivals], shapes, step_s)


def _against_tried(
    plan: Plan, tried: Sequence[tuple[Plan, float]], others: Sequence[Plan], notes: Sequence[str]
) -> list[str]:
    """Say how long the tried plans took, and how long one device and data parallelism would, if they were not tried."""
    took = "; ".join(f"{_order(own)}, {ms(own_s)}" for own, own_s in sorted(tried, key=lambda pair: pair[1]))
    line = f"tried, as predictions are too close to tell: {took} ({', '.join(notes)})"
    shapes = {describe_shape(own) for own, _ in tried}
    return [line, *_without_pipeline(others, shapes, plan.prediction.step_s)]


def _without_pipeline(others: Sequence[Plan], known: set[str], step_s: float) -> list[str]:
    """Compare one device and data parallelism with a step, where their shape is not among the known ones."""
    lines, shapes = [], set(known)
    for other in others:
        shape = describe_shape(other)
        if len(other.stages) == 1 and shape not in shapes:
            shapes.add(shape)
            lines.append(f"{shape}: {_compare(other.prediction.step_s, step_s)}")
    return lines


def _what_it_takes(other: Plan, plan: Plan) -> str:
    if len(other.devices) > len(plan.devices):
        return "with more workers"
    return "in more stages" if len(other.stages) > len(plan.stages) else "in more microbatches"


def _compare(other_s: float, own_s: float) -> str:
    if own_s <= 0:
        return ms(other_s)
    change = other_s / own_s - 1
    word = "longer" if change >= 0 else "SHORTER"
    return f"{ms(other_s)} a step, {abs(change):.1%} {word}"


def _cut(plan: Plan) -> list[str]:
    if len(plan.stages) == 1:
        return []
    p = plan.prediction
    if p.optimal:
        proof = "no cut into these stages has a smaller largest load (proven)"
    elif p.lower_bound_s > 0:
        proof = f"at most {p.bottleneck_s / p.lower_bound_s - 1:.1%} above the smallest possible (proven)"
    else:
        proof = "no bound is known"
    slowest = max(plan.stages, key=lambda stage: (stage.forward_s + stage.backward_s) / len(stage.devices))
    return [
        f"cut: the largest load, {ms(p.bottleneck_s)} a microbatch with transfers, {proof}; "
        f"stage {slowest.index} computes longest"
    ]


def _recompute(plan: Plan, asked_for: bool) -> list[str]:
    again = [str(stage.index) for stage in plan.stages if stage.recompute]
    if not again:
        return []
    extra_s = sum(stage.forward_s for stage in plan.stages if stage.recompute)
    why = "as was asked for" if asked_for else "as memory asks for it"
    return [f"recompute on stage {', '.join(again)}: {ms(extra_s)} more a microbatch, {why}"]


def _unfit(plan: Plan, others: Sequence[Plan], failures: Sequence[Exception]) -> list[str]:
    """Say what did not fit, if it would have been simpler than the choice, and what the model refused."""
    refused = [error for error in failures if not isinstance(error, InfeasibleError)]
    lines = [f"left out, as the model refuses it: {type(error).__name__}: {error}" for error in refused[:1]]
    return [*lines, *_did_not_fit(plan, others, failures)]


def _did_not_fit(plan: Plan, others: Sequence[Plan], failures: Sequence[Exception]) -> list[str]:
    if not any(isinstance(error, InfeasibleError) for error in failures):
        return []
    if any(len(candidate.devices) == 1 for candidate in (plan, *others)):
        return []
    unfit = [error for error in failures if isinstance(error, InfeasibleError)]
    numbered = [error for error in unfit if error.hint is not None]
    told = next((error for error in numbered if error.message.startswith("one device")), (numbered or unfit)[0])
    return [f"did not fit: {told.message}"]


def _what_would_help(plan: Plan) -> list[str]:
    step_s = plan.prediction.step_s
    timing = plan.timing
    free = tuple(LinkRecord(link.source, link.target, 0.0, 2.0**62) for link in timing.links)
    mean = [
        sum(getattr(stage, name) for stage in plan.stages) / len(plan.stages) for name in ("forward_s", "backward_s")
    ]
    level = tuple(replace(stage, forward_s=mean[0], backward_s=mean[1]) for stage in plan.stages)
    no_links = replace(timing, links=free, send_s=0.0, pack_bytes_per_s=None)
    changes = [
        ("links that cost nothing", replace(plan, timing=no_links)),
        ("free gradient reductions", replace(plan, timing=replace(timing, reduce_s=(0.0,) * len(timing.reduce_s)))),
        ("stages of equal time", replace(plan, stages=level)),
        ("a core for every worker", replace(plan, timing=replace(timing, n_cores=None))),
        *([] if plan.orders else [("twice the microbatches of the same size", _longer(plan))]),
    ]
    gains = []
    for what, changed in changes:
        own_s = predict_column(changed).makespan_s * plan.batch_rows / changed.batch_rows
        gain = 1 - own_s / step_s if step_s > 0 else 0.0
        if gain >= _WORTH:
            gains.append((gain, f"would help: {what}, {gain:.0%} less time a sample"))
    return [line for _, line in sorted(gains, key=lambda pair: -pair[0])]


def _longer(plan: Plan) -> Plan:
    """Return the plan for a batch twice as large in twice the microbatches."""
    return replace(plan, batch_rows=2 * plan.batch_rows, n_microbatches=2 * plan.n_microbatches)
