"""An independent check of plans: plain loops over a plan's own records; no code of the planner or the simulator.

Orders of schedules with several stages a worker come from the library, whose own tests have their closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from stagecut.partitioner.plan import OpRecord, Plan, StageRecord
from stagecut.runtime.schedules import of_part

CLOSE = 1e-9
Compute = tuple[str, int, int]  # kind, stage, microbatch
_LAG = {"zb-h1": 1, "zb-h2": 2}  # by how many microbatches a stage for each before it is behind with weight gradients
STATE_AT_MOST = 4  # a parameter, its gradient, and two moments of the optimizer


@dataclass(frozen=True)
class PlanScore:
    """What the plan's records add up to, and what in the plan contradicts it.

    ``step_s`` is the step without sharing of cores; ``shared`` says whether workers share them, in which case the
    plan's own prediction is between ``step_s`` and ``slowest_s``.
    """

    step_s: float
    slowest_s: float
    shared: bool
    faults: tuple[str, ...]


def score_plan(plan: Plan, *, one_kind: bool = True) -> PlanScore:
    """Add up a plan's records and compare; ``one_kind`` says that its devices are equally fast."""
    clock = _Clock(plan)
    step_s = clock.step_s(1.0)
    crowd = _crowd(plan)
    slowest_s = clock.step_s(crowd) + clock.between_s(crowd)
    faults = [
        *_places(plan),
        *_wires(plan),
        *_stages(plan, one_kind),
        *_memory(plan, one_kind),
        *_prediction(plan),
        *_times(plan, clock, step_s, slowest_s, crowd),
    ]
    return PlanScore(step_s, slowest_s, crowd > 1.0 or clock.between_s(1.0) > 0, tuple(faults))


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > CLOSE * max(abs(a), abs(b), 1e-12)


def _runs_on(op: OpRecord) -> list[int]:
    return [op.stage, *op.copies]


def _places(plan: Plan) -> Iterator[str]:
    """Ops in order, stages convex and none empty, copies on later stages only and each used there."""
    stage_of = {op.name: op.stage for op in plan.ops}
    known = set(plan.graph_inputs)
    for op in plan.ops:
        for name in op.inputs:
            if name not in known:
                yield f"{op.name} uses {name}, which is not there yet"
            if stage_of.get(name, 0) > op.stage:
                yield f"{op.name} of stage {op.stage} uses {name} of stage {stage_of[name]}"
        known.add(op.name)
        if list(op.copies) != sorted({s for s in op.copies if op.stage < s < len(plan.stages)}):
            yield f"{op.name} of stage {op.stage} has copies on {op.copies}"
        for s in op.copies:
            if not any(op.name in other.inputs and s in _runs_on(other) for other in plan.ops):
                yield f"nobody on stage {s} uses the copy of {op.name}"
    workers = {worker for stage in plan.stages for worker in stage.workers}
    if workers != set(range(len(plan.devices))):
        yield f"workers are numbered {sorted(workers)}, and there are devices {plan.devices}"
    for index, stage in enumerate(plan.stages):
        if tuple(plan.devices[worker] for worker in stage.workers) != stage.devices:
            yield f"stage {index} is on workers {stage.workers} and devices {stage.devices}"
        if stage.index != index or index not in stage_of.values() or not stage.devices:
            yield f"stage {index} is numbered {stage.index}, has devices {stage.devices}, or is empty"


def _wires(plan: Plan) -> Iterator[str]:
    """Every used value is local, copied or wired; every wire is used, and has its value's bytes."""
    ops = {op.name: op for op in plan.ops}
    wired = {(wire.value, s) for wire in plan.wires for s in wire.targets}
    if len(wired) != sum(len(wire.targets) for wire in plan.wires):
        yield "a value crosses twice to one stage"
    needed = set()
    for op in plan.ops:
        for s in _runs_on(op):
            for name in op.inputs:
                if name in ops and s not in _runs_on(ops[name]):
                    needed.add((name, s))
    for name, s in sorted(needed - wired):
        yield f"{name} is used on stage {s} and does not get there"
    last = len(plan.stages) - 1  # results of the model are gathered there
    for name, s in sorted(wired - needed):
        if s != last or s in _runs_on(ops[name]):
            yield f"{name} crosses to stage {s}, which does not need it"
    for wire in plan.wires:
        if wire.source != ops[wire.value].stage or wire.n_bytes != ops[wire.value].output_bytes:
            yield f"the wire of {wire.value} has {wire.n_bytes} bytes from stage {wire.source}"


def _stages(plan: Plan, one_kind: bool) -> Iterator[str]:
    """Seconds of a stage are those of its ops."""
    for stage in plan.stages:
        mine = [op for op in plan.ops if stage.index in _runs_on(op)]
        loss_s = plan.timing.loss_s if stage.index == len(plan.stages) - 1 else (0.0, 0.0)
        forward_s = math.fsum(op.forward_s for op in mine)
        backward_s = math.fsum(op.backward_s for op in mine) + (forward_s if stage.recompute else 0.0) + loss_s[1]
        forward_s += loss_s[0]
        exact = one_kind or not any(op.copies for op in mine)
        weight_s = math.fsum(op.backward_weight_s for op in mine)
        if exact and stage.backward_weight_s and _differ(stage.backward_weight_s, weight_s):
            yield f"stage {stage.index} has weight gradients of {stage.backward_weight_s} s, and its ops {weight_s} s"
        if exact and (_differ(stage.forward_s, forward_s) or _differ(stage.backward_s, backward_s)):
            yield (
                f"stage {stage.index} takes {stage.forward_s} + {stage.backward_s} s, "
                f"and its ops {forward_s} + {backward_s} s"
            )


def _memory(plan: Plan, one_kind: bool) -> Iterator[str]:
    """Bytes of a stage are what its record says that they are, within the limit."""
    orders = _orders(plan, _n_pieces(plan))
    for stage in plan.stages:
        mine = [op for op in plan.ops if stage.index in _runs_on(op)]
        where = f"stage {stage.index}"
        if stage.in_flight != _most_held(orders[stage.workers[0]], {stage.index: 1}):
            yield f"{where} has {stage.in_flight} microbatches in flight"
        held = stage.in_flight * (stage.input_bytes if stage.recompute else stage.saved_bytes)
        held += (stage.saved_bytes if stage.recompute else 0) + stage.workspace_bytes
        if held != stage.held_bytes:
            yield f"{where} says that it holds {stage.held_bytes} bytes, and its parts are {held}"
        state = stage.memory_bytes - held
        if not stage.parameter_bytes <= state <= STATE_AT_MOST * stage.parameter_bytes:
            yield f"{where} has {stage.parameter_bytes} bytes of parameters, and {state} of state"
        together = _together(plan, stage, orders)
        if stage.beside_bytes != together - stage.memory_bytes:
            yield f"the device of {where} holds {together} bytes, and {stage.device_bytes} are in the plan"
        if together > stage.memory_limit_bytes:
            yield f"the device of {where} needs {together} bytes of {stage.memory_limit_bytes}"
        workspace = max(op.workspace_bytes for op in mine)
        if one_kind and workspace > stage.workspace_bytes:  # packets and the loss may need more
            yield f"{where} has a workspace of {stage.workspace_bytes} bytes, and its ops {workspace}"
        incoming = sum(wire.n_bytes for wire in plan.wires if stage.index in wire.targets)
        if not stage.input_bytes <= incoming or stage.input_bytes > stage.saved_bytes:
            yield f"{where} has inputs of {stage.input_bytes} bytes, wires of {incoming}, saves {stage.saved_bytes}"
        made = sum(op.saved_bytes + op.output_bytes for op in mine)
        if stage.saved_bytes > made + incoming:
            yield f"{where} saves {stage.saved_bytes} bytes, more than all that is there ({made} + {incoming})"


def _prediction(plan: Plan) -> Iterator[str]:
    """Bounds are below what they bound."""
    p = plan.prediction
    if p.lower_bound_s > p.bottleneck_s * (1 + CLOSE):
        yield f"bound {p.lower_bound_s} s above the bottleneck {p.bottleneck_s} s"
    if p.optimal and p.lower_bound_s < p.bottleneck_s * (1 - 1e-6):
        yield f"called optimal, with the bound {p.lower_bound_s} s below the bottleneck {p.bottleneck_s} s"
    for stage in plan.stages:
        own_s = math.fsum(op.forward_s + op.backward_s for op in plan.ops if op.stage == stage.index)
        own_s += math.fsum(op.forward_s for op in plan.ops if op.stage == stage.index and stage.recompute)
        if own_s / len(stage.devices) > p.bottleneck_s * (1 + CLOSE):
            yield f"stage {stage.index} computes for {own_s} s, more than the bottleneck {p.bottleneck_s} s"
    whole_s = _n_pieces(plan) * (sum(plan.timing.loss_s) + math.fsum(op.forward_s + op.backward_s for op in plan.ops))
    if p.one_device_s > whole_s * (1 + CLOSE):
        yield f"one device takes {p.one_device_s} s, and the ops of all microbatches take {whole_s} s"


def _times(plan: Plan, clock: _Clock, step_s: float, slowest_s: float, crowd: float) -> Iterator[str]:
    p = plan.prediction
    if crowd <= 1.0 and not clock.between_s(1.0):
        yield from _exactly(clock, step_s, p.step_s, p.bubble)
        return
    # With a core for each worker the two clocks agree to the digit, but for the slowing.
    if crowd == plan.timing.beside and not clock.between_s(1.0):
        alone = replace(plan, timing=replace(plan.timing, beside=1.0)).predicted
        yield from _exactly(clock, step_s, alone.makespan_s, alone.bubble)
    most_work_s = max(clock.work_s_of(host) for host in set(clock.hosts))
    n_cores = plan.timing.n_cores or len(plan.devices)
    least_s = max(step_s, plan.timing.start_s + most_work_s / n_cores)
    if p.step_s < least_s * (1 - CLOSE) or p.step_s > slowest_s * (1 + CLOSE):
        yield f"a step takes {least_s} to {slowest_s} s, and {p.step_s} s were predicted"


def _exactly(clock: _Clock, step_s: float, predicted_s: float, predicted_bubble: float) -> Iterator[str]:
    if _differ(predicted_s, step_s):
        yield f"a step takes {step_s} s, and {predicted_s} s were predicted"
    bubble = 1.0 - clock.compute_s() / (step_s * clock.n_workers)
    if abs(predicted_bubble - bubble) > 1e-7:
        yield f"a bubble of {bubble}, and {predicted_bubble} was predicted"


def _n_pieces(plan: Plan) -> int:
    return min(plan.batch_rows, plan.n_microbatches * max(len(stage.devices) for stage in plan.stages))


def _mine(n_pieces: int, replica: int, n_replicas: int) -> list[int]:
    return [m for m in range(n_pieces) if m % n_replicas == replica]


def _warm_up(stages: tuple[StageRecord, ...], s: int) -> int:
    """PipeDream's rule: as many as keep the workers from here to the end busy."""
    return math.ceil(sum(len(stage.devices) for stage in stages[s:]) / len(stages[s].devices))


def _most_held(order: list[Compute], bytes_of: dict[int, int]) -> int:
    """Return the most of so many bytes a microbatch of some stages that an order holds at once."""
    held, most = 0, 0
    for kind, s, _ in order:
        held += bytes_of.get(s, 0) * {"F": 1, "B": -1, "W": -1, "I": 0}[kind]
        most = max(most, held)
    return most


def _together(plan: Plan, stage: StageRecord, orders: list[list[Compute]]) -> int:
    """Add up what a worker holds: the state of its stages, their activations, the most that one needs to compute."""
    mine = [other for other in plan.stages if other.workers == stage.workers]
    if len(mine) == 1:
        return stage.memory_bytes
    state = sum(own.memory_bytes - own.held_bytes for own in mine)
    apiece = {own.index: own.input_bytes if own.recompute else own.saved_bytes for own in mine}
    more = max(own.workspace_bytes + (own.saved_bytes if own.recompute else 0) for own in mine)
    return max([state + _most_held(orders[stage.workers[0]], apiece) + more, *(own.memory_bytes for own in mine)])


def _ahead(plan: Plan, s: int) -> int:
    """Say how far a stage forwards ahead: twice as far, less one, where transfers are to be hidden."""
    most = _warm_up(plan.stages, s)
    return 2 * most - 1 if plan.schedule in ("eager-1f1b", "zb-h2") else most


def _crowd(plan: Plan) -> float:
    """Say how many busy workers there can be for a core of a host; 1 where each has its own."""
    n_workers = len(plan.devices)
    if plan.timing.n_cores is None:
        return 1.0
    hosts = (plan.timing.hosts or tuple(range(n_workers)))[:n_workers]
    most = max(hosts.count(host) for host in hosts)
    share = most / plan.timing.n_cores
    if share > 1:
        return share * plan.timing.sharing
    return plan.timing.beside if most > 1 else 1.0


def _orders(plan: Plan, n_pieces: int) -> list[list[Compute]]:
    """List every worker's computations."""
    n_owned = sum(len(stage.workers) for stage in plan.stages)
    if plan.orders:
        return _written_orders(plan, n_pieces)
    if n_owned > len(plan.devices):
        orders = of_part(plan.schedule, plan.layout(), n_pieces)
        return [[(a.kind, a.stage, a.microbatch) for a in order] for order in orders]
    own = {}
    for stage in plan.stages:
        for replica, worker in enumerate(stage.workers):
            own[worker] = [(kind, stage.index, m) for kind, m in _order(plan, stage.index, replica, n_pieces)]
    return [own[worker] for worker in range(len(plan.devices))]


def _written_orders(plan: Plan, n_pieces: int) -> list[list[Compute]]:
    """Read the order of one replica's workers; the others do the same with microbatches of their own."""
    orders: list[list[Compute]] = [[] for _ in plan.devices]
    owners = list(dict.fromkeys(stage.workers for stage in plan.stages))
    for workers, row in zip(owners, plan.orders, strict=True):
        for replica, worker in enumerate(workers):
            for text in row:
                kind = next(letter for letter in "FBIW" if letter in text)
                s, m = map(int, text.split(kind))
                if m * len(workers) + replica < n_pieces:
                    orders[worker].append((kind, s, m * len(workers) + replica))
    return orders


def _order(plan: Plan, s: int, replica: int, n_pieces: int) -> list[tuple[str, int]]:
    """List a replica's forwards and backwards."""
    waiting = _mine(n_pieces, replica, len(plan.stages[s].devices))
    most = len(waiting) if plan.schedule == "fill-drain" else _ahead(plan, s)
    order: list[tuple[str, int]] = []
    held: list[int] = []
    while waiting or held:
        if waiting and len(held) < most:
            held.append(waiting.pop(0))
            order.append(("F", held[-1]))
        else:
            order.append(("B", held.pop(0)))
    return order if plan.schedule not in _LAG else _split(order, _LAG[plan.schedule] * s)


def _split(order: list[tuple[str, int]], lag: int) -> list[tuple[str, int]]:
    """Put an input gradient for each backward, and its weight gradient behind the one that comes ``lag`` later."""
    backwards = [m for kind, m in order if kind == "B"]
    split: list[tuple[str, int]] = []
    for kind, m in order:
        split.append(("F" if kind == "F" else "I", m))
        if kind == "B" and backwards.index(m) >= lag:
            split.append(("W", backwards[backwards.index(m) - lag]))
    return split + [("W", m) for m in backwards[max(0, len(backwards) - lag) :]]


class _Clock:
    """A longest path, found by passing over all workers until nobody can proceed."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.n_pieces = plan, _n_pieces(plan)
        self.n_workers = len(plan.devices)
        self.orders = _orders(plan, self.n_pieces)
        self.last_backward_s: dict[tuple[int, int], float] = {}
        self.hosts = (plan.timing.hosts or tuple(range(self.n_workers)))[: self.n_workers]
        self.bytes: dict[tuple[int, int], int] = {}
        self.back: dict[tuple[int, int], int] = {}
        for wire in plan.wires:
            for target in wire.targets:
                self.bytes[wire.source, target] = self.bytes.get((wire.source, target), 0) + wire.n_bytes
                if wire.gradient:
                    self.back[wire.source, target] = self.back.get((wire.source, target), 0) + wire.n_bytes

    @property
    def shares_workers(self) -> bool:
        return self.n_workers < sum(len(stage.workers) for stage in self.plan.stages)

    def between_s(self, slower: float) -> float:
        """Return by how much reductions between computations can make the step longer."""
        return slower * math.fsum(self.plan.timing.reduce_s) if self.shares_workers else 0.0

    def _worker(self, s: int, m: int) -> int:
        workers = self.plan.stages[s].workers
        return workers[m % len(workers)]

    def compute_s(self) -> float:
        return math.fsum(sum(self._all_seconds(order)) for order in self.orders)

    def work_s_of(self, host: int) -> float:
        """Add up all that keeps the host's workers busy."""
        total = 0.0
        for worker, order in enumerate(self.orders):
            if self.hosts[worker] != host:
                continue
            total += sum(self._all_seconds(order))
            total += sum(sum(self._sends(*compute).values()) for compute in order)
            total += sum(self._end_s(self.plan.timing.reduce_s, s.index) for s in self._stages_of(worker))
        return total

    def _stages_of(self, worker: int) -> list[StageRecord]:
        return [stage for stage in self.plan.stages if worker in stage.workers]

    @staticmethod
    def _end_s(seconds: tuple[float, ...], index: int) -> float:
        return seconds[index] if seconds else 0.0

    def _all_seconds(self, order: list[Compute]) -> list[float]:
        return [self._seconds(order, position) for position in range(len(order))]

    def _seconds(self, order: list[Compute], position: int) -> float:
        """Give the seconds of one compute; a stage's first backward stores gradients, the later ones add to them."""
        kind, s, _ = order[position]
        stage, timing = self.plan.stages[s], self.plan.timing
        if kind == "F":
            return stage.forward_s + timing.action_s
        if kind == "I":
            return timing.split * (stage.backward_s - stage.backward_weight_s) + timing.action_s
        own_s = stage.backward_s if kind == "B" else timing.split * stage.backward_weight_s
        adds = any(before[1] == s and before[0] in "BW" for before in order[:position])
        return own_s + timing.action_s + self._end_s(timing.accumulate_s if adds else timing.store_s, s)

    def _sends(self, kind: str, s: int, m: int) -> dict[int, float]:
        """Give, per stage elsewhere that gets a packet, the seconds that sending it keeps the sender busy."""
        timing = self.plan.timing
        if kind == "W":
            return {}
        if kind == "F":
            pairs = {b: self.bytes[a, b] for a, b in sorted(self.bytes) if a == s}
        else:
            pairs = {a: self.back[a, b] for a, b in sorted(self.back) if b == s}
        pack = timing.pack_bytes_per_s
        away = {peer: n for peer, n in pairs.items() if self._worker(peer, m) != self._worker(s, m)}
        return {peer: timing.send_s + (0.0 if pack is None else n / pack) for peer, n in away.items()}

    def _here(self, kind: str, s: int, m: int) -> list[int]:
        """List the stages of the same worker that use what was computed, without a packet."""
        pairs = [b for a, b in self.bytes if a == s] if kind == "F" else [a for a, b in self.back if b == s]
        return [peer for peer in pairs if kind != "W" and self._worker(peer, m) == self._worker(s, m)]

    def _travel_s(self, a: int, b: int) -> tuple[float, float]:
        n_bytes = self.bytes[a, b] if a < b else self.back[b, a]
        pair = (min(a, b), max(a, b))
        found = [link for link in self.plan.timing.links if (link.source, link.target) == pair]
        assert len(found) == 1, f"{len(found)} links between stages {pair}"
        return n_bytes / found[0].bytes_per_s, found[0].latency_s

    def step_s(self, slower: float) -> float:
        """Return when the last worker is done, with all that keeps a worker busy ``slower`` times as long."""
        at, now = [0] * self.n_workers, [0.0] * self.n_workers
        arrival: dict[tuple[str, int, int, int], float] = {}
        link_free: dict[tuple[int, int], float] = {}
        self.last_backward_s = {}
        moved = True
        while moved:
            moved = False
            for worker in range(self.n_workers):
                while at[worker] < len(self.orders[worker]):
                    kind, s, m = self.orders[worker][at[worker]]
                    if kind == "F":
                        needed = [("F", a, s, m) for a, b in self.bytes if b == s]
                    else:
                        needed = [("G", b, s, m) for a, b in self.back if a == s and kind != "W"]
                    if any(packet not in arrival for packet in needed):
                        break
                    begin = max([now[worker], *(arrival[packet] for packet in needed)])
                    now[worker] = begin + slower * self._seconds(self.orders[worker], at[worker])
                    what = "F" if kind == "F" else "G"
                    arrival.update({(what, s, peer, m): now[worker] for peer in self._here(kind, s, m)})
                    if kind in "BW":
                        self.last_backward_s[worker, s] = now[worker] - begin
                    for peer, busy_s in self._sends(kind, s, m).items():
                        now[worker] += slower * busy_s
                        ends = (worker, self._worker(peer, m))
                        on_link_s, latency_s = self._travel_s(s, peer)
                        link_free[ends] = max(now[worker], link_free.get(ends, 0.0)) + on_link_s
                        arrival[what, s, peer, m] = link_free[ends] + latency_s
                    at[worker] += 1
                    moved = True
        assert at == [len(order) for order in self.orders], "workers wait for each other"
        return self.plan.timing.start_s + self._last_s(now, slower)

    def _last_s(self, now: list[float], slower: float) -> float:
        """Let each stage reduce once its last replica is there."""
        if self.shares_workers:
            # Reductions are between two computations somewhere: see ``between_s``.
            return max(now[w] + sum(self._end_s(self.plan.timing.optimizer_s, s.index) for s in self._stages_of(w))
                       for w in range(self.n_workers))  # fmt: skip
        ends = []
        for s, stage in enumerate(self.plan.stages):
            together = max(now[worker] for worker in stage.workers)
            last = [worker for worker in stage.workers if now[worker] == together][-1]
            left_s = slower * self._left_s(s, self.last_backward_s.get((last, s), 0.0))
            ends.append(together + left_s + self._end_s(self.plan.timing.optimizer_s, s))
        return max(ends)

    def _left_s(self, s: int, backward_s: float) -> float:
        """Let buckets go one after the other, each when its part of the last backward is done."""
        whole_s = self._end_s(self.plan.timing.reduce_s, s)
        n = self.plan.timing.reduce_buckets[s] if self.plan.timing.reduce_buckets else 1
        end = 0.0
        for bucket in range(n):
            end = max(end, backward_s * (bucket + 1) / n) + whole_s / n
        return end - backward_s
