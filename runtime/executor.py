"""The executor: runs one worker's instructions for one step."""

from __future__ import annotations

import contextlib
import linecache
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ..errors import FailureSite
from ..structure import flatten, map_leaves
from .accelerators import is_accelerator
from .instructions import RECEIVES, Instruction, Layout, Op
from .packets import Packed, decode, pack
from .parts import FILE, OP
from .program.timeline import Span
from .replicate import Reducer
from .requests import BACKWARD, EVALUATE, FORWARD, TRAIN, StepReport, StepRequest
from .sinks import Arm
from .stage import StageRuntime
from .transport import MessageKey, Transport
from .watch.counts import StepCounts
from .watch.finite import Boundaries


class Executor:
    """Run programs on the stages that one worker owns.

    ``tick`` is called with the index of each instruction before it runs, so that somebody else can watch progress.
    ``coupled`` says that microbatches of a round depend on each other's statistics, somewhere in the pipeline: none of
    their backwards is left out. With ``check_boundaries`` it looks at what leaves its stages.
    """

    def __init__(
        self,
        worker: int,
        layout: Layout,
        stages: dict[int, StageRuntime],
        transport: Transport,
        reducers: dict[int, Reducer],
        tick: Callable[[int], None] = lambda position: None,
        *,
        coupled: bool = False,
        check_boundaries: bool = False,
    ) -> None:
        self.coupled = coupled
        self.boundaries = Boundaries() if check_boundaries else None
        self.worker = worker
        self.layout = layout
        self.stages = stages
        self.transport = transport
        self.reducers = reducers
        self.tick = tick
        self.position = 0
        device = next((stage.device for stage in stages.values()), torch.device("cpu"))
        self._device = device if is_accelerator(device) else None
        self._local: dict[MessageKey, tuple[list[Any], list[bool]]] = {}
        self._calls: dict[int, dict[int, dict[int, Any]]] = {}

    def begin(self, request: StepRequest, instructions: tuple[Instruction, ...]) -> None:
        """Prepare for a step."""
        self.request = request
        self.instructions = instructions
        self.position = 0
        self.report = StepReport()
        self.counts = StepCounts()
        self._began = time.perf_counter()
        if self.boundaries is not None:
            self.boundaries.begin()
        self._local.clear()
        self._backwards_left = {s: self._count(s, Op.BACKWARD, Op.BACKWARD_WEIGHT) for s in self.stages}
        held = self._calls.pop(request.call) if request.kind == BACKWARD else {s: {} for s in self.stages}
        for s, stage in self.stages.items():
            stage.held = held[s]
            stage.seed.base = request.seed
            stage.begin(self._count(s, Op.BACKWARD_WEIGHT) > 0, request.kind == TRAIN, request.n_microbatches)
        if request.kind == FORWARD:
            self._calls[request.call] = held
        self.transport.begin([i for i in instructions if i.op in RECEIVES], request.signature)

    def _count(self, stage: int, *ops: Op) -> int:
        return sum(1 for i in self.instructions if i.op in ops and i.stage == stage)

    @property
    def finished(self) -> bool:
        """Say whether every instruction has run."""
        return self.position == len(self.instructions)

    def ready(self) -> bool:
        """Say whether the next instruction can run without waiting (inline mode asks)."""
        return all(self.transport.ready(key) for key in self._awaited(self.instructions[self.position]))

    def run(self) -> StepReport:
        """Run all instructions, waiting where they wait, and return the report."""
        while not self.finished:
            self.execute_next()
        return self.end()

    def execute_next(self) -> None:
        """Run one instruction; an exception leaves with its place attached as ``error.stagecut``."""
        i = self.instructions[self.position]
        self.tick(self.position)
        begin = self._started = time.perf_counter()
        try:
            self._execute(i)
            if self.request.profile and self._device is not None:
                torch.accelerator.synchronize(self._device)  # kernels run on after they were told to
        except Exception as error:
            self._attach_site(error, i)
            raise
        end = time.perf_counter()
        counts = self.counts
        if i.op is Op.REDUCE:
            counts.reduce_s += end - begin
        else:
            counts.waiting_s += self._started - begin
            counts.busy_s += end - self._started
        if self.request.profile:
            self.report.spans.append(Span(self.worker, i.op.value, i.stage, i.microbatch, self._started, end))
        self.position += 1

    def end(self) -> StepReport:
        """Complete the step: every packet has left."""
        begin = time.perf_counter()
        self.transport.end()
        end = time.perf_counter()
        self.counts.waiting_s += end - begin
        self.counts.step_s = end - self._began
        self.report.counts[self.worker] = self.counts
        self.report.nonfinite = None if self.boundaries is None else self.boundaries.found
        because = {s: stage.whole_because for s, stage in self.stages.items()}
        self.report.whole_because.update({s: why for s, why in because.items() if why is not None})
        return self.report

    def forget(self, call: int) -> None:
        """Drop the activations of a forward whose backward will not come."""
        self._calls.pop(call, None)

    def _execute(self, i: Instruction) -> None:
        if i.op is Op.FORWARD:
            self._forward(i)
        elif i.op in (Op.BACKWARD, Op.BACKWARD_INPUT):
            self._backward(i)
        elif i.op is Op.BACKWARD_WEIGHT:
            self._backward_weight(i)
        elif i.op is Op.SEND_ACT:
            values, wanted = self._activations(i.stage, i.microbatch, i.peer_stage)
            self._send(i, pack(values, wanted))
        elif i.op is Op.SEND_GRAD:
            gradients = self.stages[i.stage].input_gradients(i.microbatch, i.peer_stage)
            self._send(i, pack(gradients, [False] * len(gradients)))
        elif i.op in RECEIVES:
            self.transport.post(i)
        elif i.op is Op.FREE:
            self._free(i)
        elif i.op is Op.REDUCE and self.request.sync:
            self.reducers[i.stage].complete()

    def _send(self, i: Instruction, packed: Packed) -> None:
        self.counts.sent_bytes += packed.n_bytes
        self.counts.n_sent += 1
        self.transport.send(i, packed)

    def _awaited(self, i: Instruction) -> list[MessageKey]:
        s, m = i.stage, i.microbatch
        if i.op is Op.FORWARD:
            keys = [(False, peer, s, m) for peer in self.layout.producers(s)]
        elif i.op in (Op.BACKWARD, Op.BACKWARD_INPUT):
            keys = [(True, peer, s, m) for peer in self.layout.consumers(s, gradients=True)]
        else:
            return []
        return [key for key in keys if self.layout.worker_of(key[1], m) != self.worker]

    def _packet(self, gradient: bool, origin: int, target: int, m: int) -> tuple[list[Any], list[bool]]:
        key = (gradient, origin, target, m)
        if self.layout.worker_of(origin, m) == self.worker:
            return self._local.pop(key)
        packet = self.transport.take(key)
        self.counts.received_bytes += packet.numel()
        self.counts.n_received += 1
        return decode(packet, self.stages[target].device)

    def _activations(self, s: int, m: int, consumer: int) -> tuple[list[Any], list[bool]]:
        stage = self.stages[s]
        group = next(group for group in stage.spec.wires_out if group.stage == consumer)
        results = stage.held[m].results
        values = [results[name] for name in group.values]
        wanted = [any(_needs_gradient(leaf) for leaf in flatten(value)[0]) for value in values]
        return values, wanted

    def _forward(self, i: Instruction) -> None:
        stage, request, m = self.stages[i.stage], self.request, i.microbatch
        packets: dict[str, tuple[Any, bool]] = {}
        for group in stage.spec.wires_in:
            values, wanted = self._packet(False, group.stage, i.stage, m)
            packets.update({name: (value, want) for name, value, want in zip(group.values, values, wanted)})
        self._started = time.perf_counter()
        with self._region(stage):
            held = stage.forward(m, request.inputs[m], packets)
            if stage.spec.is_last:
                if request.want_loss:
                    target = None if request.targets is None else request.targets[m]
                    self.report.losses[m] = stage.compute_loss(m, target).detach()
                if request.want_outputs:
                    self.report.outputs[m] = map_leaves(_detached, held.output)
        if self.boundaries is not None:
            self.boundaries.forward(stage, m, request)
        for consumer in self.layout.consumers(i.stage):
            if self.layout.worker_of(consumer, m) == self.worker:
                values, wanted = self._activations(i.stage, m, consumer)
                self._local[False, i.stage, consumer, m] = ([map_leaves(_detached, v) for v in values], wanted)

    @contextlib.contextmanager
    def _region(self, stage: StageRuntime) -> Any:
        dtype = self.request.autocast
        with contextlib.ExitStack() as regions:
            regions.enter_context(torch.set_grad_enabled(self.request.kind != EVALUATE))
            if dtype is not None:
                regions.enter_context(torch.autocast(stage.device.type, dtype=dtype))
            yield

    def _backward(self, i: Instruction) -> None:
        stage, m = self.stages[i.stage], i.microbatch
        incoming = {
            consumer: self._packet(True, consumer, i.stage, m)[0]
            for consumer in self.layout.consumers(i.stage, gradients=True)
        }
        self._started = time.perf_counter()
        roots, gradients = stage.roots_with_gradients(m, incoming)
        if stage.spec.is_last:
            own_roots, own_gradients = self._last_roots(stage, m)
            roots, gradients = roots + own_roots, gradients + own_gradients
        if i.op is Op.BACKWARD_INPUT:
            stage.backward_input(m, roots, gradients)
        else:
            stage.backward(m, roots, gradients, self._arm(i))
        if self.boundaries is not None:
            self.boundaries.backward(stage, m)
        for producer in self.layout.producers(i.stage, gradients=True):
            if self.layout.worker_of(producer, m) == self.worker:
                values = stage.input_gradients(m, producer)
                self._local[True, i.stage, producer, m] = (values, [False] * len(values))

    def _backward_weight(self, i: Instruction) -> None:
        self.stages[i.stage].backward_weight(i.microbatch, self._arm(i))

    def _arm(self, i: Instruction) -> Arm | None:
        """Return what arms the stage's reducer, if it has to be and this backward is the last to add to gradients."""
        self._backwards_left[i.stage] -= 1
        reducer = self.reducers[i.stage]
        last = self._backwards_left[i.stage] == 0
        return reducer.arm if last and self.request.sync and reducer.follows_autograd else None

    def _last_roots(self, stage: StageRuntime, m: int) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        if self.request.kind == TRAIN:
            loss = stage.held[m].loss
            assert loss is not None
            if self.request.weights[m] == 0:
                # A mean over nothing (every target ignored) is not a number, and 0 times its gradient neither.
                if not self.coupled:
                    return [], []
                found = [leaf for leaf in flatten(stage.held[m].output)[0] if _needs_gradient(leaf)]
                return found, [torch.zeros_like(leaf) for leaf in found]
            return [loss], [torch.full_like(loss, self.request.weights[m])]
        assert self.request.output_gradients is not None
        pairs = [
            (leaf, gradient)
            for leaf, gradient in zip(flatten(stage.held[m].output)[0], self.request.output_gradients[m])
            if gradient is not None and _needs_gradient(leaf)
        ]
        return [leaf for leaf, _ in pairs], [gradient.to(leaf.device) for leaf, gradient in pairs]

    def _free(self, i: Instruction) -> None:
        if self.request.kind == FORWARD:
            return
        self.stages[i.stage].free(i.microbatch)

    def _attach_site(self, error: Exception, i: Instruction) -> None:
        if getattr(error, "stagecut", None) is not None:
            return
        path = _module_path(error.__traceback__, self.stages[i.stage])
        microbatch = i.microbatch if i.microbatch >= 0 else None
        replica = self.layout.workers[i.stage].index(self.worker)
        site = FailureSite(self.worker, i.stage, microbatch, str(i), path, replica, self.request.step)
        error.stagecut = site  # type: ignore[attr-defined]
        error.add_note(f"stagecut: in {site}")


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _module_path(trace: TracebackType | None, stage: StageRuntime) -> str | None:
    """Find the op of the stage in whose generated line the error was raised, and the module that it belongs to."""
    paths = {record.name.replace(".", "_"): record.module_path for record in stage.spec.nodes}
    found = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith("<eval_with_key>"):
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            name = line.split("=", 1)[0].split(":", 1)[0].strip()
            found = paths.get(name, found)
        elif code.co_filename.startswith(FILE):
            found = paths.get(linecache.getline(code.co_filename, trace.tb_lineno).strip().partition(OP)[2], found)
        trace = trace.tb_next
    return found or None
