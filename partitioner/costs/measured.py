"""Seconds of every distinct op, measured once on this device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ...heap import freed_memory_kept
from ...runtime.program.recordable import why_not_node
from ...structure import map_leaves, tensors_in
from ..analysis import OpFacts
from ..cluster import DeviceKind
from ..cpu import pace, processor_name, threads
from ..meter import bytes_of, storage_of
from ..recording.state import untouched
from .analytic import analytic_costs, from_parameters
from .cache import Cache
from .isolated import Isolated, Timed, cloned
from .op_cost import FREE, OpCost, is_free
from .replay import Calls, together

_MIN_RUNS = 4
_MIN_TIMED_S = 5e-3  # per op; quick ops are repeated until they have run for so long
_MOST_RUNS = 64
_ENGINE_RUNS = 50
_SLOW_S = 0.1  # slower ops are timed twice only, once warm
# Seconds, there and back, of the ops that are timed as recordings run them. Priced as autograd runs it, an MLP of 200
# tiny layers was predicted to take 1.7 to 2.4 times what it took.
_QUICK_S = 5e-4
_RECORDED_ROUNDS = 5
_MIB = 1 << 20
# In a real stage an op writes memory that was last used a microbatch ago, reads weights from then, and its inputs were
# only just made. So an op is timed on several sets of inputs, weights and results in turn, which together are as large
# as what a step touches, up to so many bytes; and inputs are read just before. Against whole forwards and backwards of
# a transformer, ResNet-50 and an MLP, rings of 16 MiB came out 3 to 28 % too fast, of 256 MiB 7 % too fast to 4 % slow.
_RING_BYTES = 256 * _MIB
# A machine that is shared stalls now and then: where repeats differ by more, there are more of them. The median of all
# is taken, not that of the calmest: steps will meet the same machine.
_CALM = 1.3
_MOST_TRIES = 3
# And it changes its speed for seconds at a time: ops are timed in several passes over all of them, as long as that is
# quick. With one pass the step of an MLP was predicted as 134 to 156 ms, one plan in fifteen chose wrongly.
_PASSES = 3
_ENOUGH_S = 3.0


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


def touched_bytes(graph_module: fx.GraphModule, facts: Mapping[str, OpFacts]) -> int:
    """Return the memory that a microbatch touches: the model's state, and what is saved for the backward."""
    state = (*graph_module.parameters(), *graph_module.buffers())
    return sum(map(bytes_of, state)) + sum(own.saved_bytes for own in facts.values())


def measured_costs(
    graph_module: fx.GraphModule,
    facts: dict[str, OpFacts],
    kind: DeviceKind,
    n_threads: int,
    *,
    touched_bytes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    onednn: bool = False,
) -> dict[str, OpCost]:
    """Time every distinct op once on this machine's device of ``kind``, by itself: the memory of one op at a time.

    ``touched_bytes`` is the memory that a microbatch touches, all ops together: an op finds the caches accordingly.
    Results are kept on disk (``$STAGECUT_CACHE``, by default ``~/.cache/stagecut``) by op, shapes, dtypes, strides,
    device, threads and torch version, and are good as long as the machine is as fast as then. Ops that do not run on
    made-up inputs are priced analytically. With ``onednn`` large products are oneDNN's, as recordings have them, so
    that all ops which can be recorded are timed in recordings.
    """
    device = _device_of(kind)
    assert device is not None, can_measure(kind)
    ring_bytes = _ring_bytes(touched_bytes)
    context = _context(device, n_threads, ring_bytes) + ("/onednn" if onednn else "")
    cache = Cache(_pace_of(device))
    nodes = [n for n in graph_module.graph.nodes if n.op != "output"]
    work = {n.name: Isolated(n, graph_module, facts) for n in nodes if not is_free(facts[n.name])}
    constant = from_parameters(graph_module.graph, facts)
    weights = {n.name: [i.name for i in n.all_input_nodes if i.name in constant] for n in nodes}
    places = {n.name: [p for p, i in enumerate(n.all_input_nodes) if i.name in constant] for n in nodes}
    signatures = {name: own.signature(f"{context}/weights at {places[name]}") for name, own in work.items()}
    fresh = {signatures[name]: isolated for name, isolated in work.items() if signatures[name] not in cache.known}
    with threads(n_threads), untouched(graph_module):
        found, failed = _timed(fresh, weights, _Stopwatch(device, ring_bytes, onednn), progress)
    cache.known.update(found)
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


def _timed(
    fresh: Mapping[str, Isolated],
    weights: Mapping[str, Sequence[str]],
    stopwatch: _Stopwatch,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, tuple[float, float, float]], set[str]]:
    """Time every op, all of them several times over if that is quick; return medians, and the ops that do not run."""
    times: dict[str, list[tuple[float, float, float]]] = {signature: [] for signature in fresh}
    failed: set[str] = set()
    total, done, start = _PASSES * len(fresh), 0, time.perf_counter()
    for _ in range(_PASSES if fresh else 0):
        with freed_memory_kept():  # and given back after each pass, so that none finds more of it than the first
            for signature, isolated in fresh.items():
                progress(done, total)
                done += 1
                if signature not in failed:
                    try:
                        recorded = why_not_node(isolated.node, isolated.owner) is None
                        times[signature].append(stopwatch.time(isolated, weights[isolated.node.name], recorded))
                    except Exception:
                        failed.add(signature)
        if time.perf_counter() - start > _ENOUGH_S:
            break
    progress(total, total)
    known = {signature: list(zip(*own)) for signature, own in times.items() if signature not in failed}
    medians = {key: [statistics.median(column) for column in columns] for key, columns in known.items()}
    return {key: (f, b, w) for key, (f, b, w) in medians.items()}, failed


def measured_call(call: Timed, kind: DeviceKind, n_threads: int, *, touched_bytes: int) -> tuple[float, float]:
    """Time one call, forward and backward, as an op is timed by :func:`measured_costs`; the result is kept.

    Raises:
        Exception: what the call raises on made-up inputs.
    """
    device = _device_of(kind)
    assert device is not None, can_measure(kind)
    cache, ring_bytes = Cache(_pace_of(device)), _ring_bytes(touched_bytes)
    signature = call.signature(_context(device, n_threads, ring_bytes))
    if signature not in cache.known:
        with threads(n_threads), freed_memory_kept():
            cache.known[signature] = _Stopwatch(device, ring_bytes).time(call, ())
        cache.save()
    forward_s, backward_s, _ = cache.known[signature]
    return forward_s, backward_s


def _pace_of(device: torch.device) -> tuple[float, float]:
    """Return how fast the device is today; only CPUs are shared with strangers."""
    return pace() if device.type == "cpu" else (1.0, 1.0)


def _ring_bytes(touched_bytes: int) -> int:
    """Round up coarsely, so that like models share what was measured."""
    return min(_RING_BYTES, 1 << max(0, touched_bytes - 1).bit_length())


def _context(device: torch.device, n_threads: int, ring_bytes: int) -> str:
    return f"{_name_of(device)}/{n_threads}/{torch.__version__}/{ring_bytes}/without autograd's start"


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return processor_name()


class _Memory:
    """Makes tensors of the same layout as others; those that share memory share it here too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fill with normal numbers, zeros where integers may be indices, true for masks."""
        key = (storage_of(tensor), tensor.dtype)
        if key not in self._made:
            self._made[key] = self._filled(tensor)
        made = self._made[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return made.detach().requires_grad_(tensor.requires_grad)

    def _filled(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        memory = torch.empty(size, dtype=tensor.dtype, device=self._device)
        if tensor.is_floating_point() or tensor.is_complex():
            return memory.normal_()
        return memory.fill_(tensor.dtype is torch.bool)


class _Stopwatch:
    """Times single ops on a device, warm, on memory as cold as in a step that touches ``ring_bytes``."""

    def __init__(self, device: torch.device, ring_bytes: int, onednn: bool = False) -> None:
        self.device, self.onednn = device, onednn
        self.ring_bytes = ring_bytes if device.type == "cpu" else 0
        self.engine_s = self._engine_s()

    def _engine_s(self) -> float:
        """Return what autograd takes to start and to end, which a stage pays once and not for every op."""
        x = torch.zeros(1, device=self.device, requires_grad=True)
        y, incoming = x.view_as(x), torch.ones(1, device=self.device)
        times = []
        for _ in range(_ENGINE_RUNS):
            start = self.now()
            torch.autograd.grad(y, x, incoming, retain_graph=True)
            times.append(self.now() - start)
        return statistics.median(times)

    def time(self, isolated: Timed, weights: Sequence[str], recorded: bool = False) -> tuple[float, float, float]:
        """Return median seconds of the forward, of the backward, and of that the part for parameters' gradients.

        ``weights`` names the inputs that come from parameters alone. A quick op on a CPU, any op if products are
        oneDNN's, is timed as a recording of its stage runs it, if it can be ``recorded``.
        """
        first = _Run(isolated, weights, self)
        first.once(weights_too=True)  # libraries set themselves up in a first run
        taken = self._seconds_once(first)
        n_runs = _runs(taken)
        n_sets = max(1, min(n_runs, math.ceil(self.ring_bytes / max(1, first.held_bytes))))
        ring = [first, *(_Run(isolated, weights, self) for _ in range(n_sets - 1))]
        n_rounds = math.ceil(n_runs / n_sets)
        recorded = recorded and self.device.type == "cpu" and not isolated.writes_inputs
        if recorded and (self.onednn or self._is_quick(first, taken)):
            n_rounds = max(n_rounds, _RECORDED_ROUNDS)
            for run in ring:
                run.record()
        forwards, backwards = self._medians(ring, n_rounds, weights_too=True)
        if not first.own or not backwards:
            return forwards, backwards, 0.0
        inputs_only = self._medians(ring, n_rounds, weights_too=False)[1] if first.given else 0.0
        return forwards, backwards, max(0.0, backwards - inputs_only)

    def _seconds_once(self, run: _Run) -> float:
        start = self.now()
        run.once(weights_too=True)
        return self.now() - start

    def _is_quick(self, run: _Run, taken: float) -> bool:
        """Say whether an op is timed as recorded, by what a run takes at best: the first ones take longer."""
        for _ in range(_RECORDED_ROUNDS):
            if not _QUICK_S < taken < 3 * _QUICK_S:
                break
            taken = self._seconds_once(run)
        return taken <= _QUICK_S

    def _medians(self, ring: Sequence[_Run], n_rounds: int, *, weights_too: bool) -> tuple[float, float]:
        """Time forwards and backwards in turn around the ring; again, a few times, while they differ much."""
        times: list[tuple[float, float]] = []
        for _ in range(_MOST_TRIES):
            times += [pair for _ in range(n_rounds) for pair in self._around(ring, weights_too)]
            totals = sorted(map(sum, times))
            if totals[len(totals) // 2] <= _CALM * totals[0]:
                break
        forward_s, backward_s = (statistics.median(column) for column in zip(*times))
        return forward_s, backward_s

    def _around(self, ring: Sequence[_Run], weights_too: bool) -> list[tuple[float, float]]:
        """Run the forwards of all, then the backwards of all."""
        recorded = [(run.calls, run.back_calls[weights_too]) for run in ring if run.calls is not None]
        if recorded:
            forwards, backwards = zip(*recorded)
            return [together(forwards, backwards, self.now)]
        seconds = [run.forward() for run in ring]
        return [(forward_s, run.backward(weights_too)) for forward_s, run in zip(seconds, ring)]

    def now(self) -> float:
        """Read the clock when the device has done all that it was told."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def _runs(seconds: float) -> int:
    """Say how often to run what takes so long: quick ops often, as they vary most."""
    if seconds > _SLOW_S:
        return 2
    return min(_MOST_RUNS, max(_MIN_RUNS, math.ceil(_MIN_TIMED_S / max(seconds, 1e-7))))


class _Run:
    """An op with inputs and parameters of its own, to be run again and again."""

    def __init__(self, isolated: Timed, weights: Sequence[str], stopwatch: _Stopwatch) -> None:
        self.isolated, self.stopwatch = isolated, stopwatch
        of_weights = {id(t) for value in isolated.values_of(weights) for t in tensors_in(value)}
        self.given: list[torch.Tensor] = []
        self.own: list[torch.Tensor] = []

        memory = _Memory(stopwatch.device)

        def make(like: torch.Tensor) -> torch.Tensor:
            made = memory.like(like)
            if made.requires_grad:
                (self.own if id(like) in of_weights else self.given).append(made)
            return made

        self.args, self.kwargs = isolated.inputs(make)
        self.function, parameters = isolated.standalone(stopwatch.device)
        self.own += [parameter for parameter in parameters if parameter.requires_grad]
        self.roots: list[torch.Tensor] = []
        self.held_bytes = 0
        self.calls: Calls | None = None  # of a forward, once they are noted
        self.back_calls: dict[bool, Calls] = {}  # and of a backward, by whether parameters get gradients too

    def record(self) -> None:
        """Note what a forward and its backwards call."""
        for weights_too in (True, False):
            self.calls, self.back_calls[weights_too] = (Calls(self.stopwatch.onednn) for _ in range(2))
            with self.calls:
                outputs = self.function(*self.args, **self.kwargs)
            roots = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
            wanted = self._wanted(weights_too)
            incoming = [torch.ones_like(root) for root in roots]
            if roots and wanted:
                with self.back_calls[weights_too]:
                    torch.autograd.grad(roots, wanted, incoming, allow_unused=True)

    def _wanted(self, weights_too: bool) -> list[torch.Tensor]:
        return [*self.given, *self.own] if weights_too else self.given

    def once(self, *, weights_too: bool) -> None:
        """Run a forward and its backward, and note how much memory they touch."""
        self.forward()
        touched = (*tensors_in((self.args, self.kwargs)), *self.own, *self.roots)
        self.backward(weights_too)
        self.held_bytes = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in touched}.values())

    def forward(self) -> float:
        """Return the seconds of one forward; its results are held until the backward."""
        args, kwargs = self.args, self.kwargs
        if self.isolated.writes_inputs:
            args, kwargs = map_leaves(cloned, (args, kwargs))
        if self.stopwatch.ring_bytes:
            _read((args, kwargs))
        start = self.stopwatch.now()
        outputs = self.function(*args, **kwargs)
        seconds = self.stopwatch.now() - start
        self.roots = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
        self.outputs = outputs
        return seconds

    def backward(self, weights_too: bool) -> float:
        """Return the seconds of the backward of the last forward, to the inputs and to the parameters if wanted."""
        wanted = self._wanted(weights_too)
        roots, self.roots, self.outputs = self.roots, [], None
        if not roots or not wanted:
            return 0.0
        incoming = [torch.ones_like(root) for root in roots]
        start = self.stopwatch.now()
        torch.autograd.grad(roots, wanted, incoming, allow_unused=True)
        return max(0.0, self.stopwatch.now() - start - self.stopwatch.engine_s)


def _read(inputs: Any) -> None:
    """Bring into the caches what the op before has just written."""
    for tensor in tensors_in(inputs):
        if tensor.is_floating_point():
            tensor.detach().sum()
