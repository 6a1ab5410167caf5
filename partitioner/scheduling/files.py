"""Costs and schedules in files: JSON of our own, and the compute-only CSV of ``torch.distributed.pipelining``."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from ...errors import ConstraintError
from ...records import finite
from ...runtime.instructions import Layout
from ...runtime.schedules.tokens import from_token, token
from .clock import Problem
from .costs import PipelineCosts
from .critical import critical_path
from .idle import idle_by_cause
from .score import Orders, Scored, score

_LISTS = ("forward_s", "backward_input_s", "backward_weight_s", "activation_bytes", "weight_grad_bytes")
_OPTIONAL = ("memory_bytes", "link_s", "op_overhead_s", "split_backward")


def costs_from_json(data: Any) -> PipelineCosts:
    """Build costs from the JSON value of a costs file; fields are those of :class:`PipelineCosts`.

    ``link_s`` may be one number for all boundaries; ``memory_bytes`` may be null, also for single workers.

    Raises:
        ConstraintError: naming the key that is unknown, missing, or has another type.
    """
    if not isinstance(data, dict):
        raise ConstraintError(f"$: expected an object, got {_show(data)}")
    for key in data:
        if key not in (*_LISTS, *_OPTIONAL):
            raise ConstraintError(f"$.{key}: unknown key; there are {', '.join((*_LISTS, *_OPTIONAL))}")
    lists = {name: _numbers(data, name) for name in _LISTS}
    link = data.get("link_s", 0.0)
    n_boundaries = max(0, len(lists["forward_s"]) - 1)
    links = _numbers(data, "link_s") if isinstance(link, list) else (_number(link, "$.link_s"),) * n_boundaries
    limits = data.get("memory_bytes")
    split = data.get("split_backward", True)
    if not isinstance(split, bool):
        raise ConstraintError(f"$.split_backward: expected true or false, got {_show(split)}")
    return PipelineCosts(
        **lists,
        link_s=links,
        memory_bytes=None if limits is None else _numbers(data, "memory_bytes", empty=math.inf),
        op_overhead_s=_number(data.get("op_overhead_s", 0.0), "$.op_overhead_s"),
        split_backward=split,
    )


def _numbers(data: dict[str, Any], name: str, empty: float | None = None) -> tuple[float, ...]:
    values = data.get(name)
    if not isinstance(values, list):
        raise ConstraintError(f"$.{name}: expected a list of numbers, got {_show(values)}")
    return tuple(
        empty if value is None and empty is not None else _number(value, f"$.{name}[{place}]")
        for place, value in enumerate(values)
    )


def _number(value: Any, path: str) -> float:
    number = finite(value)
    if number is None:
        raise ConstraintError(f"{path}: expected a number, got {_show(value)}")
    return number


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def to_json(scored: Scored, seconds: float) -> dict[str, Any]:
    """Return the answer for a schedule: plain values, in seconds and bytes."""
    return {
        "name": scored.name,
        "n_microbatches": scored.problem.n_microbatches,
        "worker_of_stage": [owners[0] for owners in scored.problem.layout.workers],
        "order": [[token(action) for action in order] for order in scored.orders],
        "makespan_s": scored.makespan_s,
        "bubble": scored.bubble,
        "span_bubble": scored.span_bubble,
        "bubble_by_cause": idle_by_cause(scored),
        "critical_path": [token(action) for action in critical_path(scored.problem, scored.orders, scored.ends_s)],
        "peak_bytes": list(scored.peak_bytes),
        "peak_in_flight": list(scored.peak_in_flight),
        "lower_bound_s": scored.lower_bound_s,
        "seconds": seconds,
    }


def orders_from_json(data: Any) -> Orders:
    """Read the order per worker out of an answer that :func:`to_json` made, or out of a bare list of lists.

    Raises:
        ConstraintError: it is neither; with the place.
    """
    rows = data.get("order") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ConstraintError(f"$.order: expected a list of computations per worker, got {_show(rows)}")
    return tuple(
        tuple(from_token(str(text), f"$.order[{w}][{place}]") for place, text in enumerate(row))
        for w, row in enumerate(rows)
    )


def to_csv(orders: Orders) -> str:
    """Write one line per worker, as ``PipelineScheduleMulti._load_csv(..., format="compute_only")`` reads it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[token(action) for action in order] for order in orders])
    return text.getvalue()


def orders_from_csv(text: str) -> Orders:
    """Read one line per worker; empty fields, torch's idle steps, are left out.

    Raises:
        ConstraintError: a field is no computation; with its line and column.
    """
    return tuple(
        tuple(
            from_token(field, f"line {line}, column {column}")
            for column, field in enumerate(row, start=1)
            if field.strip()
        )
        for line, row in enumerate(csv.reader(io.StringIO(text)), start=1)
    )


def scored_orders(name: str, costs: PipelineCosts, orders: Orders) -> Scored:
    """Time orders from elsewhere: stages are placed as the orders say.

    Raises:
        ConstraintError: two workers compute the same stage, a stage or a worker is without the other, or the orders are
            no schedule.
        InfeasibleError: a worker holds more than its memory.
    """
    owner: dict[int, int] = {}
    for worker, order in enumerate(orders):
        if not order:
            raise ConstraintError(f"{name}: worker {worker} computes nothing; leave its line out")
        for action in order:
            if owner.setdefault(action.stage, worker) != worker:
                raise ConstraintError(
                    f"{name}: stage {action.stage} is computed by workers {owner[action.stage]} and {worker}; "
                    "replicas are not part of a schedule's file"
                )
    if sorted(owner) != list(range(costs.n_stages)):
        raise ConstraintError(f"{name}: it orders stages {sorted(owner)}, and the costs are of {costs.n_stages} stages")
    if costs.memory_bytes is not None and len(costs.memory_bytes) != len(orders):
        raise ConstraintError(
            f"{name}: it is for {len(orders)} workers, and memory_bytes has {len(costs.memory_bytes)}"
        )
    wires = tuple((s, s + 1) for s in range(costs.n_stages - 1))
    layout = Layout(tuple((owner[s],) for s in range(costs.n_stages)), wires, wires)
    n_microbatches = 1 + max(action.microbatch for order in orders for action in order)
    return score(name, Problem(costs, layout, n_microbatches), orders)


def chrome_trace(scored: Scored) -> dict[str, Any]:
    """Return the schedule as a trace that chrome://tracing and Perfetto show; microseconds.

    The format is the "Trace Event Format" of the Chromium project.
    """
    events: list[dict[str, Any]] = []
    for worker, order in enumerate(scored.orders):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": worker, "args": {"name": f"worker {worker}"}})
        for action, start, end in zip(order, scored.starts_s(worker), scored.ends_s[worker]):
            events.append(
                {
                    "ph": "X",
                    "name": token(action),
                    "cat": action.kind,
                    "pid": 0,
                    "tid": worker,
                    "ts": start * 1e6,
                    "dur": (end - start) * 1e6,
                    "args": {"stage": action.stage, "microbatch": action.microbatch},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
