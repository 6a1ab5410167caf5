"""Seconds of every distinct op, measured once on this device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx

from ...structure import map_leaves, tensors_in
from ..analysis import OpFacts
from ..cluster import DeviceKind
from ..recording.state import untouched
from .analytic import analytic_costs
from .cache import Cache
from .isolated import Isolated, cloned
from .op_cost import FREE, OpCost, is_free

_REPEATS = 5
_MIN_TIMED_S = 200e-6
# Written before each timed forward: in a real stage other ops have used the inner caches since an op last ran. Without
# it forwards of small convolutions came out a third too fast; before backwards too, those came out half too slow.
_EVICTED_BYTES = 4 << 20


def measured_costs(
    graph_module: fx.GraphModule,
    facts: dict[str, OpFacts],
    kind: DeviceKind,
    n_threads: int,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, OpCost]:
    """Time every distinct op once on this CPU, with ``n_threads`` threads, by itself: the memory of one op at a time.

    Results are kept on disk (``$STAGECUT_CACHE``, by default ``~/.cache/stagecut``) by op, shapes, dtypes, strides,
    threads and torch version. Ops that do not run on made-up inputs are priced analytically.
    """
    context = f"cpu/{n_threads}/{torch.__version__}/{_processor()}"
    cache = Cache()
    nodes = [n for n in graph_module.graph.nodes if n.op != "output"]
    work = {n.name: Isolated(n, graph_module, facts) for n in nodes if not is_free(facts[n.name])}
    signatures = {name: isolated.signature(context) for name, isolated in work.items()}
    fresh = {signatures[name]: isolated for name, isolated in work.items() if signatures[name] not in cache.known}
    failed: set[str] = set()
    with _threads(n_threads), untouched(graph_module):
        for done, (signature, isolated) in enumerate(fresh.items()):
            progress(done, len(fresh))
            try:
                cache.known[signature] = _time(isolated)
            except Exception:
                failed.add(signature)
        progress(len(fresh), len(fresh))
    cache.save()
    analytic = analytic_costs(graph_module, facts, kind) if failed else {}
    costs = {n.name: FREE for n in nodes}
    for name, signature in signatures.items():
        if signature in failed:
            costs[name] = analytic[name]
        else:
            forward_s, backward_s = cache.known[signature]
            costs[name] = OpCost(forward_s, backward_s, "measured" if signature in fresh else "cached")
    return costs


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    return "unknown"


@contextmanager
def _threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _made_up(like: torch.Tensor) -> torch.Tensor:
    """Make a tensor of the same layout: normal numbers, zeros where integers may be indices, true for masks."""
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    if like.is_floating_point() or like.is_complex():
        return made.normal_().requires_grad_(like.requires_grad)
    return made.fill_(like.dtype is torch.bool)


def _time(isolated: Isolated) -> tuple[float, float]:
    """Return the median seconds of forward and backward, warm."""
    args, kwargs = isolated.inputs(_made_up)
    function, parameters = isolated.standalone()
    wanted = [tensor for tensor in (*tensors_in([args, kwargs]), *parameters) if tensor.requires_grad]
    once = _time_once(isolated, function, args, kwargs, wanted)
    repeats = min(50, max(_REPEATS, math.ceil(_MIN_TIMED_S * 10 / max(sum(once), 1e-7))))
    times = [_time_once(isolated, function, args, kwargs, wanted) for _ in range(repeats)]
    return statistics.median(f for f, _ in times), statistics.median(b for _, b in times)


def _time_once(
    isolated: Isolated, function: Callable[..., Any], args: Any, kwargs: Any, wanted: list[torch.Tensor]
) -> tuple[float, float]:
    if isolated.writes_inputs:
        args, kwargs = map_leaves(cloned, (args, kwargs))
    torch.ones(_EVICTED_BYTES // 4)
    start = time.perf_counter()
    outputs = function(*args, **kwargs)
    middle = time.perf_counter()
    roots = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    gradients = [torch.ones_like(root) for root in roots]
    begin = time.perf_counter()
    if roots and wanted:
        torch.autograd.grad(roots, wanted, gradients, allow_unused=True)
    return middle - start, time.perf_counter() - begin
