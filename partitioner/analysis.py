"""Facts about every op of a captured graph, from one run on fake tensors: no memory, no arithmetic."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..structure import tensors_in
from .captured import Capture
from .meter import Kernel, Meter, bytes_of, storage_of
from .recording.emit import SOURCE
from .recording.state import untouched


@dataclass
class OpFacts:
    """What one op does.

    Attributes:
        name, op, target: as in the graph.
        module_path: the innermost module of the model whose code the op belongs to.
        source: ``file:line`` of that code, if known.
        inputs: the ops and graph inputs that it uses, in order.
        kernels: what the forward runs, with its arithmetic by dtype and its memory traffic.
        output_bytes: bytes of the result's tensors, as a packet would carry them.
        saved_bytes: bytes that autograd keeps for the backward and that no earlier op keeps; parameters excluded.
        saves: every storage that autograd keeps for the op's backward, with its bytes; parameters excluded.
        holds: the storages of the result, with their bytes.
        parameters: names of parameters and buffers that it reads.
        random: draws random numbers.
        differentiable: the result carries gradients.
        value: the result on fake tensors, an example of its shapes and types.
        touched: storages that it reads or writes; written: those that it changes in place.
    """

    name: str
    op: str
    target: str
    module_path: str = ""
    source: str | None = None
    inputs: tuple[str, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    output_bytes: int = 0
    saved_bytes: int = 0
    parameters: tuple[str, ...] = ()
    random: bool = False
    differentiable: bool = False
    value: Any = None
    touched: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    saves: dict[int, int] = field(default_factory=dict)
    holds: dict[int, int] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Sum the arithmetic of the forward, whatever the dtypes."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def moved_bytes(self) -> int:
        """Sum the memory traffic of the forward."""
        return sum(kernel.moved_bytes for kernel in self.kernels)

    @property
    def n_kernels(self) -> int:
        """Count the kernels of the forward."""
        return len(self.kernels)


def example_like(leaf: torch.Tensor, rows: int | None) -> torch.Tensor:
    """Describe a tensor like ``leaf`` on the meta device, with ``rows`` rows if given."""
    shape = leaf.shape if rows is None else (rows, *leaf.shape[1:])
    return torch.empty(shape, dtype=leaf.dtype, device="meta")


def analyse(capture: Capture, tensors: list[torch.Tensor], rows: int) -> dict[str, OpFacts]:
    """Return the facts of every op, in graph order, at ``rows`` samples.

    ``tensors`` are the call's tensor leaves (values are not looked at). Where fake tensors are not enough, because an
    opaque module looks at data, the graph is run once for real, with a warning. Parameters on the meta device are taken
    for ones on the CPU, unless the graph makes tensors on the meta device itself that do not go with them.

    Raises:
        Exception: what the model itself raises on real tensors.
    """
    with suppress(Exception):
        return _run(capture, tensors, rows, real=False, on_cpu=True)
    try:
        return _run(capture, tensors, rows, real=False, on_cpu=False)
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"stagecut: shapes cannot be known without running the model ({type(error).__name__}: {text}); "
            "running it once on the example inputs",
            stacklevel=2,
        )
        return _run(capture, tensors, rows, real=True, on_cpu=False)


def _run(capture: Capture, tensors: list[torch.Tensor], rows: int, *, real: bool, on_cpu: bool) -> dict[str, OpFacts]:
    """Run on real tensors or on fake ones; those for tensors of the meta device are on it, or ``on_cpu``."""
    module = capture.graph_module
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    batched = [leaf.batched for leaf in capture.inputs.leaves if leaf.graph_input is not None]
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    for submodule, _ in modes:
        submodule.training = True
    try:
        if real:
            with untouched(capture.model), _kept(state):
                inputs = [_real_rows(tensor, rows) if cut else tensor for tensor, cut in zip(tensors, batched)]
                return _interpret(capture, inputs, state)
        with untouched(capture.model), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            inputs = [
                torch.empty_strided(
                    *_layout(tensor, rows if cut else None), dtype=tensor.dtype, device=_place(tensor, on_cpu)
                )
                for tensor, cut in zip(tensors, batched)
            ]
            return _interpret(
                capture, inputs, {name: stand_in(fake, tensor, on_cpu=on_cpu) for name, tensor in state.items()}
            )
    finally:
        torch.clear_autocast_cache()  # the caller's autocast must not keep weights that were cast without data
        for submodule, mode in modes:
            submodule.training = mode


def _place(tensor: torch.Tensor, on_cpu: bool) -> str:
    return "meta" if tensor.is_meta and not on_cpu else "cpu"


def stand_in(fake: FakeTensorMode, tensor: torch.Tensor, *, on_cpu: bool = True) -> torch.Tensor:
    """Make a fake parameter or buffer like ``tensor``; ``on_cpu`` even if it is on the meta device.

    There torch takes apart what a device has a kernel for: attention would keep a score for every two tokens.
    """
    if not tensor.is_meta or not on_cpu:
        return fake.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return made.requires_grad_(tensor.requires_grad)


def _layout(tensor: torch.Tensor, rows: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shaped = example_like(tensor, rows)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        shaped = shaped.to(memory_format=torch.channels_last)
    return tuple(shaped.shape), shaped.stride()


def _real_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    repeats = -(-rows // tensor.shape[0])
    return tensor.repeat(repeats, *[1] * (tensor.dim() - 1))[:rows].clone()


@contextmanager
def _kept(state: dict[str, torch.Tensor]) -> Iterator[None]:
    before = {name: tensor.detach().clone() for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                state[name].copy_(value)


class _Runner(nn.Module):
    """Lets ``functional_call`` swap the state of a graph module that an interpreter runs."""

    def __init__(self, interpreter: _Interpreter) -> None:
        super().__init__()
        self.module = interpreter.module
        self._interpreter = (interpreter,)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._interpreter[0].run(*inputs)


def _interpret(capture: Capture, inputs: list[torch.Tensor], state: Mapping[str, torch.Tensor]) -> dict[str, OpFacts]:
    interpreter = _Interpreter(capture, state)
    for tensor in inputs:
        interpreter.owned.add(storage_of(tensor))
    # What autograd holds, the hooks and what they return, must not lead back to the tensors that hold autograd's graph:
    # no garbage collector sees such a circle, in which the model would hang too.
    pack, packed = weakref.WeakMethod(interpreter.pack), interpreter.packed
    with interpreter.meter, torch.autograd.graph.saved_tensors_hooks(lambda t: pack()(t), packed.__getitem__):  # type: ignore[misc]
        torch.func.functional_call(
            _Runner(interpreter),
            {f"module.{name}": tensor for name, tensor in state.items()},
            tuple(inputs),
            strict=False,
        )
    packed.clear()
    return interpreter.facts


class _Interpreter(fx.Interpreter):
    def __init__(self, capture: Capture, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__(capture.graph_module, garbage_collect_values=False)
        self.extra_traceback = False
        self.facts: dict[str, OpFacts] = {}
        self.meter = Meter()
        self.owned = {storage_of(tensor) for tensor in state.values()}
        self._alive = set(self.owned)
        self._saved: set[int] = set()
        self._parameters = parameters_read(capture)
        self.packed: list[torch.Tensor] = []
        self._current: OpFacts | None = None

    def pack(self, tensor: torch.Tensor) -> int:
        """Note what autograd saves, and return a number for it."""
        storage = storage_of(tensor)
        if self._current is not None and storage not in self.owned:
            n_bytes = tensor.untyped_storage().nbytes()
            self._current.saves[storage] = n_bytes
            if storage not in self._saved:
                self._saved.add(storage)
                self._current.saved_bytes += n_bytes
        self.packed.append(tensor)
        return len(self.packed) - 1

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return super().run_node(n)
        facts = OpFacts(
            n.name, n.op, _target_name(n), _module_path(n), n.meta.get(SOURCE), tuple(i.name for i in n.all_input_nodes)
        )
        self.facts[n.name] = self._current = facts
        self.meter.reset()
        value = super().run_node(n)
        meter = self.meter
        facts.kernels, facts.random = tuple(meter.kernels), meter.random
        facts.parameters = self._parameters[n.name]
        facts.value = value
        tensors = tensors_in(value)
        storages = {storage_of(tensor) for tensor in tensors}
        facts.output_bytes = sum(bytes_of(tensor) for tensor in tensors)
        facts.holds = {storage_of(t): t.untyped_storage().nbytes() for t in tensors if storage_of(t) not in self.owned}
        facts.differentiable = any(tensor.requires_grad for tensor in tensors)
        self._alive.update(storages)
        facts.written = meter.written & self._alive  # not what was made and dropped inside the op
        read = {storage_of(t) for i in n.all_input_nodes for t in tensors_in(self.env[i])}
        facts.touched = storages | read | facts.written
        return value


def parameters_read(capture: Capture) -> dict[str, tuple[str, ...]]:
    """Return, per node of the graph, the parameters and buffers of the model that it reads, by their first names."""
    names_in_model = _names_by_identity(capture)
    module = capture.graph_module
    read: dict[str, tuple[str, ...]] = {}
    for n in module.graph.nodes:
        names: list[str] = []
        if n.op in ("call_module", "get_attr"):
            value = reduce(getattr, str(n.target).split("."), module)
            inner = (*value.named_parameters(), *value.named_buffers()) if isinstance(value, nn.Module) else ()
            names = [f"{n.target}.{name}" for name, _ in inner]
        if n.op == "get_attr":
            names = names or [str(n.target)]
        read[n.name] = tuple(dict.fromkeys(names_in_model[name] for name in names if name in names_in_model))
    return read


def _names_by_identity(capture: Capture) -> dict[str, str]:
    """Map names inside the graph module to names in the model; tensors with several names keep their first."""
    model, graph_module = capture.model, capture.graph_module
    first: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        first.setdefault(id(tensor), name)
    inside = (
        *graph_module.named_parameters(remove_duplicate=False),
        *graph_module.named_buffers(remove_duplicate=False),
    )
    return {name: first[id(tensor)] for name, tensor in inside if id(tensor) in first}


def _target_name(n: fx.Node) -> str:
    if isinstance(n.target, str):
        return n.target
    return f"{getattr(n.target, '__module__', '')}.{getattr(n.target, '__name__', n.target)}".removeprefix(".")


def _module_path(n: fx.Node) -> str:
    stack = n.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""
