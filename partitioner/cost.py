"""Costs: seconds of every op, forward and backward, measured or from a roofline; each number names its source."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..runtime.program.calls import Folded, InRegion
from ..structure import flatten, map_leaves, tensors_in
from .analysis import Meter, OpFacts, storage_of
from .cluster import DeviceKind
from .recording.state import untouched

_REPEATS = 5
_MIN_TIMED_S = 200e-6
_CACHE_VERSION = 5
# Written before each timed forward: in a real stage other ops have used the inner caches since an op last ran. Without
# it forwards of small convolutions came out a third too fast; before backwards too, those came out half too slow.
_EVICTED_BYTES = 4 << 20


@dataclass(frozen=True)
class OpCost:
    """Seconds of one op for one microbatch. ``source`` is ``measured``, ``cached``, ``analytic`` or ``none``."""

    forward_s: float
    backward_s: float
    source: str


FREE = OpCost(0.0, 0.0, "none")
_FREE_OPS = ("placeholder", "get_attr", "output")


def _is_free(facts: OpFacts) -> bool:
    return facts.op in _FREE_OPS or not tensors_in(facts.value)


class _Isolated:
    """One op by itself, on inputs of the right shapes, so that it can be run again and again."""

    def __init__(self, node: fx.Node, module: fx.GraphModule, facts: dict[str, OpFacts]) -> None:
        self.node = node
        self.facts = facts
        self.owner = module
        self.writes_inputs = bool(
            facts[node.name].written
            & {storage_of(t) for i in node.all_input_nodes for t in tensors_in(facts[i.name].value)}
        )

    def inputs(self, make: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, Any]:
        """Build the op's arguments with ``make`` for each tensor."""
        made: dict[str, Any] = {}

        def resolve(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            if leaf.name not in made:
                value = self.facts[leaf.name].value
                made[leaf.name] = map_leaves(lambda item: make(item) if isinstance(item, torch.Tensor) else item, value)
            return made[leaf.name]

        args, kwargs = fx.node.map_aggregate((self.node.args, dict(self.node.kwargs)), resolve)
        return list(args), dict(kwargs)

    def _module(self) -> nn.Module | None:
        """Return the module that the op calls, directly or in a region."""
        if self.node.op == "call_module":
            return self.owner.get_submodule(str(self.node.target))
        if isinstance(self.node.target, InRegion) and self.node.target.function is None:
            first: Any = self.node.args[0]
            called: nn.Module = self.facts[first.name].value
            return called
        return None

    def call(self, args: Any, kwargs: Any, state: dict[str, torch.Tensor] | None) -> Any:
        """Run the op; modules run on copies of their buffers, so that nothing of the model changes."""
        module = self._module()
        if module is not None:
            return self._call_module(
                lambda *given, **named: torch.func.functional_call(module, state or {}, given, named), args, kwargs
            )
        if self.node.op == "call_method":
            return getattr(args[0], str(self.node.target))(*args[1:], **kwargs)
        assert callable(self.node.target)
        return self.node.target(*args, **kwargs)

    def _call_module(self, module: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if isinstance(self.node.target, InRegion):
            return self.node.target(module, *args[1:], **kwargs)
        return module(*args, **kwargs)

    def state(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy the state of the op's module."""
        module = self._module()
        if module is None:
            return {}
        return {name: copy(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}

    def standalone(self) -> tuple[Callable[..., Any], list[torch.Tensor]]:
        """Return the op as a function, and its parameters: a module's own copy, so that nothing of the model changes.

        Swapping a module's state at every call instead would cost more than a small op takes.
        """
        module = self._module()
        if module is None:
            return (lambda *args, **kwargs: self.call(args, kwargs, None)), []
        own = copy.deepcopy(module)
        return (lambda *args, **kwargs: self._call_module(own, args, kwargs)), list(own.parameters())

    def signature(self, context: str) -> str:
        """Name the work: equal signatures cost the same."""
        described: list[str] = []

        def describe(leaf: Any) -> None:
            described.append(_describe(self.facts[leaf.name].value) if isinstance(leaf, fx.Node) else repr(leaf))

        fx.node.map_aggregate((self.node.args, self.node.kwargs), describe)
        target = self.facts[self.node.name].target
        module = self._module()
        if module is not None:
            state = [f"{tuple(t.shape)}{t.dtype}{t.requires_grad}" for t in (*module.parameters(), *module.buffers())]
            code = module.body.code if isinstance(module, Folded) else ""
            region = self.node.target if isinstance(self.node.target, InRegion) else ""
            target = f"{type(module).__module__}.{type(module).__qualname__}{module!r}{state}{code}{region}"
        text = "|".join([context, self.node.op, target, *described])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _describe(value: Any) -> str:
    def one(leaf: Any) -> str:
        if isinstance(leaf, nn.Module):
            return type(leaf).__qualname__
        if isinstance(leaf, torch.Tensor):
            return f"{tuple(leaf.shape)}{leaf.stride()}{leaf.dtype}{leaf.requires_grad}"
        return repr(leaf)

    return ",".join(one(leaf) for leaf in flatten(value)[0])


def _wanted(isolated: _Isolated, args: Any, kwargs: Any, state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    candidates = tensors_in([args, kwargs]) + list(state.values())
    return [tensor for tensor in candidates if tensor.requires_grad]


def _backward(outputs: Any, wanted: list[torch.Tensor]) -> None:
    roots = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    if roots and wanted:
        torch.autograd.grad(roots, wanted, [torch.ones_like(root) for root in roots], allow_unused=True)


def analytic_costs(graph_module: fx.GraphModule, facts: dict[str, OpFacts], kind: DeviceKind) -> dict[str, OpCost]:
    """Price every op by a roofline: the forward by its facts, the backward by running it on fake tensors.

    The roofline is that of Williams, Waterman and Patterson, 2009 (https://doi.org/10.1145/1498765.1498785).
    """
    with untouched(graph_module):
        return _analytic_costs(graph_module, facts, kind)


def _analytic_costs(graph_module: fx.GraphModule, facts: dict[str, OpFacts], kind: DeviceKind) -> dict[str, OpCost]:
    known: dict[str, OpCost] = {}
    costs: dict[str, OpCost] = {}
    for node in graph_module.graph.nodes:
        if node.op == "output" or _is_free(facts[node.name]):
            costs[node.name] = FREE
            continue
        isolated = _Isolated(node, graph_module, facts)
        signature = isolated.signature(kind.name)
        if signature not in known:
            own = facts[node.name]
            forward_s = roofline_s(kind, own.flops, own.moved_bytes, own.n_kernels)
            known[signature] = OpCost(forward_s, _fake_backward_s(isolated, kind, forward_s), "analytic")
        costs[node.name] = known[signature]
    costs.pop("output", None)
    return costs


def roofline_s(kind: DeviceKind, flops: int, moved_bytes: int, n_kernels: int) -> float:
    """Return the seconds that the roofline of ``kind`` allows."""
    return max(flops / kind.flops_per_s, moved_bytes / kind.bytes_per_s) + n_kernels * kind.kernel_overhead_s


def _fake_backward_s(isolated: _Isolated, kind: DeviceKind, forward_s: float) -> float:
    """Price the backward; where an op does not run by itself on fake tensors, two forwards stand for it."""
    with suppress(Exception), FakeTensorMode(allow_non_fake_inputs=True) as fake:

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            return fake.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)

        def make(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).requires_grad_(
                tensor.requires_grad
            )

        args, kwargs = isolated.inputs(make)
        state = isolated.state(copy)
        wanted = _wanted(isolated, args, kwargs, state)
        if isolated.writes_inputs:
            args, kwargs = map_leaves(_cloned, (args, kwargs))
        outputs = isolated.call(args, kwargs, state)
        with Meter() as meter:
            _backward(outputs, wanted)
        return roofline_s(kind, meter.flops, meter.moved_bytes, meter.n_kernels)
    return 2 * forward_s


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


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
    cache = _Cache()
    nodes = [n for n in graph_module.graph.nodes if n.op != "output"]
    work = {n.name: _Isolated(n, graph_module, facts) for n in nodes if not _is_free(facts[n.name])}
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


def _time(isolated: _Isolated) -> tuple[float, float]:
    """Return the median seconds of forward and backward, warm."""
    args, kwargs = isolated.inputs(_made_up)
    function, parameters = isolated.standalone()
    wanted = [tensor for tensor in (*tensors_in([args, kwargs]), *parameters) if tensor.requires_grad]
    once = _time_once(isolated, function, args, kwargs, wanted)
    repeats = min(50, max(_REPEATS, math.ceil(_MIN_TIMED_S * 10 / max(sum(once), 1e-7))))
    times = [_time_once(isolated, function, args, kwargs, wanted) for _ in range(repeats)]
    return statistics.median(f for f, _ in times), statistics.median(b for _, b in times)


def _time_once(
    isolated: _Isolated, function: Callable[..., Any], args: Any, kwargs: Any, wanted: list[torch.Tensor]
) -> tuple[float, float]:
    if isolated.writes_inputs:
        args, kwargs = map_leaves(_cloned, (args, kwargs))
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


class _Cache:
    """Measured seconds on disk, one JSON file; a file that cannot be read is measured again and replaced."""

    def __init__(self) -> None:
        folder = Path(os.environ.get("STAGECUT_CACHE") or Path.home() / ".cache" / "stagecut")
        self.path = folder / f"costs-{_CACHE_VERSION}.json"
        self.known: dict[str, tuple[float, float]] = {}
        with suppress(OSError, ValueError, TypeError):
            self.known = {key: (float(f), float(b)) for key, (f, b) in json.loads(self.path.read_text()).items()}

    def save(self) -> None:
        """Replace the file in one step; costs that cannot be kept are only measured again."""
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.known))
            os.replace(temporary, self.path)
        except OSError as error:
            print(f"stagecut: measured costs are not kept ({error})", file=sys.stderr)
