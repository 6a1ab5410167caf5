"""Seconds of every distinct op, measured once on this device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...structure import map_leaves, tensors_in
from ..analysis import OpFacts
from ..cluster import DeviceKind
from ..cpu import processor_name, threads
from ..recording.state import untouched
from .analytic import analytic_costs, from_parameters
from .cache import Cache
from .isolated import Isolated, cloned
from .op_cost import FREE, OpCost, is_free

_REPEATS = 4
_MIN_TIMED_S = 5e-3  # per op; quick ops are repeated until they have run for so long
_SLOW_S = 0.1  # slower ops are timed twice only, once warm
_MIB = 1 << 20
# In a real stage other ops have used the caches since an op last ran, but its inputs were only just made. So before
# each timed forward a block is written and the inputs are read again. How large a block depends on what a step touches
# (model state and what it saves). Against whole forwards and backwards of a transformer, ResNet-50, an MLP and a small
# convolutional net no block came out 3 to 17 % too fast, 4 MiB for all 46 % too slow for the small net, and 16 MiB 13 %
# too fast for the transformer's forward at 4 rows.
_EVICTED_BYTES = ((3 * _MIB, 0), (12 * _MIB, 4 * _MIB), (48 * _MIB, 16 * _MIB), (math.inf, 40 * _MIB))
# A machine that is shared stalls now and then: repeats that differ by more are done again, and the calmest are taken.
_CALM = 1.3
_MOST_TRIES = 3


def can_measure(kind: DeviceKind) -> str | None:
    """Say why ops cannot be timed on a kind of device here, or None."""
    if _device_of(kind) is None:
        return f"no device of kind {kind.name} is here to measure on"
    return None


def _device_of(kind: DeviceKind) -> torch.device | None:
    if kind.name == "cpu":
        return torch.device("cpu")
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return None


def measured_costs(
    graph_module: fx.GraphModule,
    facts: dict[str, OpFacts],
    kind: DeviceKind,
    n_threads: int,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, OpCost]:
    """Time every distinct op once on this machine's device of ``kind``, by itself: the memory of one op at a time.

    Results are kept on disk (``$STAGECUT_CACHE``, by default ``~/.cache/stagecut``) by op, shapes, dtypes, strides,
    device, threads and torch version. Ops that do not run on made-up inputs are priced analytically.
    """
    device = _device_of(kind)
    assert device is not None, can_measure(kind)
    block_bytes = _evicted_bytes(graph_module, facts)
    context = f"{_name_of(device)}/{n_threads}/{torch.__version__}/{block_bytes}"
    cache = Cache()
    nodes = [n for n in graph_module.graph.nodes if n.op != "output"]
    work = {n.name: Isolated(n, graph_module, facts) for n in nodes if not is_free(facts[n.name])}
    constant = from_parameters(graph_module.graph, facts)
    weights = {n.name: [i.name for i in n.all_input_nodes if i.name in constant] for n in nodes}
    places = {n.name: [p for p, i in enumerate(n.all_input_nodes) if i.name in constant] for n in nodes}
    signatures = {name: own.signature(f"{context}/weights at {places[name]}") for name, own in work.items()}
    fresh = {signatures[name]: isolated for name, isolated in work.items() if signatures[name] not in cache.known}
    failed: set[str] = set()
    with threads(n_threads), untouched(graph_module):
        stopwatch = _Stopwatch(device, block_bytes)
        for done, (signature, isolated) in enumerate(fresh.items()):
            progress(done, len(fresh))
            try:
                cache.known[signature] = stopwatch.time(isolated, weights[isolated.node.name])
            except Exception:
                failed.add(signature)
        progress(len(fresh), len(fresh))
    cache.save()
    estimates = analytic_costs(graph_module, facts, kind)
    costs = {n.name: FREE for n in nodes}
    for name, signature in signatures.items():
        if signature in failed:
            costs[name] = estimates[name]
        else:
            forward_s, backward_s, weight_s = cache.known[signature]
            costs[name] = replace(
                estimates[name],
                forward_s=forward_s,
                backward_s=backward_s,
                backward_weight_s=weight_s,
                source="measured" if signature in fresh else "cached",
            )
    return costs


def _evicted_bytes(graph_module: fx.GraphModule, facts: dict[str, OpFacts]) -> int:
    state = sum(
        tensor.numel() * tensor.element_size() for tensor in (*graph_module.parameters(), *graph_module.buffers())
    )
    touched = state + sum(own.saved_bytes for own in facts.values())
    return next(block for most, block in _EVICTED_BYTES if touched < most)


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return processor_name()


def _made_up(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Make a tensor of the same layout: normal numbers, zeros where integers may be indices, true for masks."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride())) if like.numel() else 0
    memory = torch.empty(reach, dtype=like.dtype, device=device)  # filled flat: what is expanded lies over itself
    if like.is_floating_point() or like.is_complex():
        return memory.normal_().as_strided(like.shape, like.stride()).requires_grad_(like.requires_grad)
    return memory.fill_(like.dtype is torch.bool).as_strided(like.shape, like.stride())


class _Stopwatch:
    """Times single ops on a device, warm."""

    def __init__(self, device: torch.device, block_bytes: int) -> None:
        self.device = device
        self.block = torch.empty(block_bytes // 4) if device.type == "cpu" else None

    def time(self, isolated: Isolated, weights: Sequence[str]) -> tuple[float, float, float]:
        """Return median seconds of the forward, of the backward, and of that the part for parameters' gradients.

        ``weights`` names the inputs that come from parameters alone.
        """
        of_weights = {id(t) for name in weights for t in tensors_in(isolated.facts[name].value)}
        given: list[torch.Tensor] = []
        own: list[torch.Tensor] = []

        def make(like: torch.Tensor) -> torch.Tensor:
            made = _made_up(like, self.device)
            if made.requires_grad:
                (own if id(like) in of_weights else given).append(made)
            return made

        args, kwargs = isolated.inputs(make)
        function, parameters = isolated.standalone(self.device)
        own += [parameter for parameter in parameters if parameter.requires_grad]
        run = _Run(isolated, function, args, kwargs, given, own, self)
        run.once()  # libraries set themselves up in a first run
        tries = []
        for _ in range(_MOST_TRIES):
            times = [run.once()]
            times += [run.once() for _ in range(_repeats(sum(times[0])))]
            tries.append(tuple(statistics.median(column) for column in zip(*times)))
            totals = sorted(map(sum, times))
            if totals[len(totals) // 2] <= _CALM * totals[0]:
                break
        forward_s, backward_s, input_s = min(tries, key=sum)
        return forward_s, backward_s, max(0.0, backward_s - input_s)

    def now(self) -> float:
        """Read the clock when the device has done all that it was told."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def disturb(self, inputs: Any) -> None:
        """Leave the caches as other ops would: their data in, the inputs just made."""
        if self.block is None or not self.block.numel():
            return
        self.block.fill_(1.0)
        for tensor in tensors_in(inputs):
            if tensor.is_floating_point():
                tensor.detach().sum()


def _repeats(seconds: float) -> int:
    """Say how often to repeat a run that takes so long: quick ones often, as they vary most."""
    if seconds > _SLOW_S:
        return 1
    return min(40, max(_REPEATS, math.ceil(_MIN_TIMED_S / max(seconds, 1e-7)))) - 1


@dataclass
class _Run:
    """An op with its inputs and parameters, to be run again and again."""

    isolated: Isolated
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    given: list[torch.Tensor]
    own: list[torch.Tensor]
    stopwatch: _Stopwatch

    def once(self) -> tuple[float, float, float]:
        """Return the seconds of one forward, of its backward, and of a backward to the inputs alone."""
        args, kwargs = self.args, self.kwargs
        if self.isolated.writes_inputs:
            args, kwargs = map_leaves(cloned, (args, kwargs))
        self.stopwatch.disturb((args, kwargs))
        start = self.stopwatch.now()
        outputs = self.function(*args, **kwargs)
        forward_s = self.stopwatch.now() - start
        roots = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
        if not roots or not (self.given or self.own):
            return forward_s, 0.0, 0.0
        if not self.own:
            seconds = self._backward(roots, self.given, again=False)
            return forward_s, seconds, seconds
        backward_s = self._backward(roots, [*self.given, *self.own], again=bool(self.given))
        return forward_s, backward_s, self._backward(roots, self.given, again=False) if self.given else 0.0

    def _backward(self, roots: list[torch.Tensor], wanted: list[torch.Tensor], *, again: bool) -> float:
        gradients = [torch.ones_like(root) for root in roots]
        start = self.stopwatch.now()
        torch.autograd.grad(roots, wanted, gradients, retain_graph=again, allow_unused=True)
        return self.stopwatch.now() - start
