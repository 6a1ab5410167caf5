"""The engine under torchrun: every rank runs the user's script, and owns the stages of its worker."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import CheckpointError, DeviceError, PlanError, ShapeError, StageError
from ..records import from_json, to_json
from ..structure import flatten, is_encodable, unflatten
from .batchnorm import replicas_of, synced_stages
from .checkpoint import Placement, users_by_name
from .checkpoint.peers import Ranks
from .engine import Programs, fresh_gradients, model_state
from .executor import Executor
from .gradients import joined_norm, own_norm
from .groups import all_ranks, at_work, closed_at_exit, make_group, peers_told
from .instructions import Op
from .neighbours import RoutedTransport, transport_of
from .options import Options
from .packets import decode, encode
from .program import PipelineSpec, Program, Span
from .replicate import DataParallelReducer, NoReduction, Reducer, Replicas
from .requests import BACKWARD, TRAIN, StepReport, StepRequest
from .sharded import ShardedReducer, adopt, dense, load
from .stage import StageRuntime, isolated_randomness, settle_statistics
from .synced import Rounds, rounds_of
from .unsynced import Unsynced
from .watch.finding import NonFinite, first_of
from .watch.owner import Owner
from .watch.residents import Resident, resident
from .weights import Weights, materialised, names_of

_SAMPLE_BYTES = 1 << 16
_LOSS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OPS = tuple(op.value for op in Op)


def under_torchrun() -> bool:
    """Say whether this process is one rank of several that run the same script."""
    return "TORCHELASTIC_RUN_ID" in os.environ or (dist.is_available() and dist.is_initialized())


def on_one_machine() -> bool:
    """Say whether torchrun started all ranks on this machine; no, where it does not say."""
    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    return local is not None and local == world


def gathered(text: str, timeout_s: float) -> list[str]:
    """Return the text of every rank, in their order: a call that all ranks make."""
    group = all_ranks(timeout_s)
    data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
    size = torch.tensor([data.numel()])
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size, group=group)
    own = torch.zeros(max(int(other.item()) for other in sizes), dtype=torch.uint8)
    own[: data.numel()] = data
    everyone = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(everyone, own, group=group)
    return [other[: int(n.item())].numpy().tobytes().decode() for other, n in zip(everyone, sizes)]


@peers_told("while rank 0 planned")
def share_text(make: Callable[[], str], timeout_s: float) -> str:
    """Let rank 0 make a text and give it to every rank; its failure is every rank's failure.

    The others wait as long as it takes, and ``timeout_s`` for a rank that is gone. The text travels as bytes, not as a
    pickled object.
    """
    group = all_ranks(timeout_s)
    error: Exception | None = None
    text = ""
    with at_work(group, timeout_s):
        if dist.get_rank() == 0:
            try:
                text = "+" + make()
            except Exception as caught:
                error, text = caught, f"-{type(caught).__name__}: {caught}"
    data = torch.frombuffer(bytearray(text.encode() or b"-"), dtype=torch.uint8)
    size = torch.tensor([data.numel()])
    dist.broadcast(size, 0, group=group)
    if dist.get_rank() != 0:
        data = torch.empty(int(size.item()), dtype=torch.uint8)
    dist.broadcast(data, 0, group=group)
    if error is not None:
        raise error
    text = data.numpy().tobytes().decode()
    if text[0] == "-":
        raise PlanError(f"rank 0 could not plan: {text[1:]}")
    return text[1:]


class SpmdEngine:
    """One rank's part of a pipeline; worker w is rank w.

    Parameters start from rank 0's values. Each rank keeps those of its own stages and releases the memory of the
    others: they keep their names and identity but are empty, and have no gradient, so optimizers leave them alone.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        timeout_s: float,
        options: Options,
    ) -> None:
        layout = spec.layout
        if dist.get_world_size() != layout.n_workers:
            raise DeviceError(
                f"the plan has {layout.n_workers} workers and torchrun started {dist.get_world_size()} ranks",
                hint=f"torchrun --nproc-per-node {layout.n_workers} …",
            )
        self._spec = spec
        self._model = model
        self._process = Owner()
        self._look = options.stage.check_boundaries
        self._timeout_s = timeout_s
        self._group = all_ranks(timeout_s)
        self._worker = dist.get_rank()
        self.n_threads = torch.get_num_threads()
        self.unsynced = Unsynced("would keep whole gradients on every replica (shard=True)" if options.shard else None)
        self._parts: dict[str, torch.Tensor] = {}
        self._device = torch.device(spec.devices[self._worker])
        synced = synced_stages(spec.stages, layout, options.stage.batchnorm)
        self.n_together = replicas_of(synced, layout)
        self._programs = Programs(spec, synced)
        self._names = {id(tensor): name for name, tensor in reversed(list(model_state(model).items()))}
        self._compare_fingerprints()
        self._users = users_by_name(spec, self._names)
        self._take_over_state(options.weights)
        own = [s for s, owners in enumerate(layout.workers) if self._worker in owners]
        rounds = {s: self._rounds(s) for s in sorted(synced)}
        stages = {
            s: StageRuntime(spec.stages[s], self._device, loss_fn, options.stage, steady=True, rounds=rounds.get(s))
            for s in own
        }
        self._transport = transport_of(layout, self._worker, spec.devices, self._group, timeout_s)
        self.replica_group: Any = None
        reducers = self._reducers(stages, options)
        self._sharding = [r for _, r in sorted(reducers.items()) if isinstance(r, ShardedReducer)]
        if self._sharding:
            self._adopt_shares(stages, reducers)
        self._executor = Executor(
            self._worker, layout, stages, self._transport, reducers, coupled=bool(synced), check_boundaries=self._look
        )
        self._ties = self._tie_groups()
        self._is_open = True
        closed_at_exit(self)

    def _compare_fingerprints(self) -> None:
        digest = hashlib.sha256(self._spec.fingerprint.encode()).digest()
        self._expect_equal(
            digest,
            PlanError("the ranks hold different models or plans", hint="make the model the same way on every rank"),
        )

    def _expect_equal(self, digest: bytes, error: Exception) -> None:
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine, group=self._group)
        if any(not torch.equal(other, everyone[0]) for other in everyone):
            raise error

    def _take_over_state(self, weights: Weights | None) -> None:
        """Take rank 0's values, move what is used here to this rank's device, and release the rest.

        Of a model on the meta device each rank reads what it owns, and nobody has the rest.
        """
        if weights is not None:
            weights.agree(self.common_seed)
        self._owner: dict[str, int] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._owned: list[tuple[str, torch.Tensor]] = []
        by_name = {self._names[id(t)]: t for t in model_state(self._model).values()}
        every_name = names_of(self._model)
        for name, tensor in by_name.items():
            workers = [w for s in self._users[name] for w in self._spec.layout.workers[s]]
            mine = self._worker in workers or not workers
            self._owner[name] = workers[0] if workers else -1
            self._shapes[name] = tensor.shape
            if mine:
                self._owned.append((name, tensor))
            if tensor.is_meta:
                assert weights is not None, "compile has seen to it"
                data = torch.empty(tensor.shape if mine else (0,), dtype=tensor.dtype)
                if mine:
                    weights.fill(every_name[id(tensor)], data)
                materialised(tensor, data.to(self._device))
                continue
            data = tensor.detach().cpu().contiguous()
            dist.broadcast(data, 0, group=self._group)
            tensor.data = data.to(self._device) if mine else data.new_empty(0)
        self._by_name = by_name

    def _reducers(self, stages: dict[int, StageRuntime], options: Options) -> dict[int, Reducer]:
        reducers: dict[int, Reducer] = {}
        devices = self._spec.devices
        for s, owners in enumerate(self._spec.layout.workers):
            on_gpus = all(torch.device(devices[w]).type == "cuda" for w in owners)
            backend = "nccl" if on_gpus else "gloo"
            group = make_group(owners, backend, self._timeout_s) if len(owners) > 1 else None
            if s in stages:
                module = stages[s].module
                elsewhere = {id(p) for t, other in stages.items() if t != s for p in other.module.parameters()}
                common = [name for name, parameter in module.named_parameters() if id(parameter) in elsewhere]
                if group is None:
                    reducers[s] = NoReduction()
                    continue
                self.replica_group = self.replica_group or group
                if options.shard:
                    reducers[s] = self._sharded(module, group, owners, common)
                else:
                    reducers[s] = DataParallelReducer(module, group, len(owners), common, options.comm_hook)
        return reducers

    def _sharded(self, module: nn.Module, group: Any, owners: tuple[int, ...], common: Sequence[str]) -> ShardedReducer:
        """Shard what only one stage uses.

        Raises:
            DeviceError: replicas are on devices of different kinds.
        """
        kinds = {torch.device(self._spec.devices[w]).type for w in owners}
        if len(kinds) > 1:
            raise DeviceError(f"shard=True needs replicas on devices of one kind, and a stage has {sorted(kinds)}")
        tied = {id(self._by_name[name]) for name, stages in self._users.items() if len(stages) > 1}
        whole = [name for name, parameter in module.named_parameters() if id(parameter) in tied]
        return ShardedReducer(module, group, len(owners), kinds.pop(), whole, common)

    def _adopt_shares(self, stages: dict[int, StageRuntime], reducers: dict[int, Reducer]) -> None:
        """Know the sharded parameters by the names of those in whose place they are."""
        replaced = {old: pair for reducer in self._sharding for old, pair in reducer.replaced.items()}
        adopt(self._model, replaced)
        for s, stage in stages.items():
            reducer = reducers[s]
            if isinstance(reducer, ShardedReducer):
                reducer.rebind(stage.spec.attributes)
                reducer.rebind(self._spec.whole.attributes)
                reducer.replaced.clear()  # the whole parameters of before
        self._names = {id(tensor): name for name, tensor in reversed(list(model_state(self._model).items()))}
        self._by_name = {self._names[id(t)]: t for t in model_state(self._model).values()}
        self._owned = [(name, self._by_name[name]) for name, _ in self._owned]

    def _tie_groups(self) -> list[tuple[list[nn.Parameter], Any, float]]:
        """Make a group for every set of stages that share parameters; every rank makes them in the same order."""
        sets: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for name, stages in self._users.items():
            tensor = self._by_name[name]
            if len(stages) > 1 and isinstance(tensor, nn.Parameter):
                sets.setdefault(tuple(stages), []).append(tensor)
        groups = []
        for sharing, parameters in sorted(sets.items()):
            ranks = sorted({w for s in sharing for w in self._spec.layout.workers[s]})
            group = make_group(ranks, "gloo", self._timeout_s)
            own = [s for s in sharing if self._worker in self._spec.layout.workers[s]]
            if own:
                # Of one stage here replicas have the sum already; of several each has what it computed.
                n_alike = len(self._spec.layout.workers[own[0]]) if len(own) == 1 else 1
                groups.append((parameters, group, 1.0 / n_alike))
        return groups

    def run(self, request: StepRequest) -> StepReport:
        """Carry out this rank's part of a request; every rank must make the same call with the same batch.

        Raises:
            StallError, WorkerLost: a rank was silent for too long, or is gone.
        """
        with peers_told(f"in step {request.call}"):
            return self._run(request)

    def _run(self, request: StepRequest) -> StepReport:
        self._check_batch(request)
        program = self._programs.get(self._programs.key_of(request))
        modes = {path: module.training for path, module in self._model.named_modules(remove_duplicate=False)}
        for s, stage in self._executor.stages.items():
            stage.set_modes(modes)
            reducer = self._executor.reducers[s]
            if isinstance(reducer, DataParallelReducer):
                reducer.refresh()
        trains = request.kind in (TRAIN, BACKWARD)
        parameters = {name: tensor for name, tensor in self._owned if isinstance(tensor, nn.Parameter)}
        goes_on = self.unsynced.resume() if trains else frozenset()
        filled = list(parameters.values()) if trains else []
        with isolated_randomness(self._spec.random), self._gathered_parameters(), fresh_gradients(filled):
            for name in goes_on:
                parameters[name].grad = self._parts[name]
            self._executor.begin(request, program.workers[self._worker])
            report = self._executor.run()
            if trains and request.sync:
                self._sum_ties()
            if trains:
                self._take_parts(parameters, request.sync)
        for name, part in self._parts.items() if trains else ():
            self.unsynced.hold(name, parameters[name], part)
        settle_statistics(self._executor.stages, self._gathered)
        self._share_buffers()
        return self._gather(report, request)

    def _gathered(self, stage: int, row: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of all replicas of a stage of this rank."""
        reducer = self._executor.reducers[stage]
        return reducer.gathered(row) if isinstance(reducer, Replicas) else [row]

    def _rounds(self, stage: int) -> Rounds:
        """Make what replicas of a stage exchange statistics by; every rank does, in the same order."""
        owners = self._spec.layout.workers[stage]
        on_gpus = all(torch.device(self._spec.devices[w]).type == "cuda" for w in owners)
        return rounds_of(owners, "nccl" if on_gpus else "gloo", self._timeout_s)

    @contextmanager
    def _gathered_parameters(self) -> Iterator[None]:
        """Have all of every parameter of this rank's stages for the while."""
        for reducer in self._sharding:
            reducer.unshard()
        try:
            yield
        finally:
            for reducer in self._sharding:
                reducer.reshard()

    def _take_parts(self, parameters: dict[str, nn.Parameter], complete: bool) -> None:
        """Keep apart what replicas have yet to sum; nothing where they have."""
        self._parts = {} if complete else {n: p.grad for n, p in parameters.items() if p.grad is not None}
        for name in self._parts:
            parameters[name].grad = None

    def _check_batch(self, request: StepRequest) -> None:
        """Refuse a step in which ranks were given different batches; large tensors are sampled."""
        digest = hashlib.sha256(f"{request.kind} {request.weights}".encode())
        targets = request.targets or ()
        for leaf in flatten([list(request.inputs), list(targets)])[0]:
            if isinstance(leaf, torch.Tensor):
                stride = max(1, leaf.numel() * leaf.element_size() // _SAMPLE_BYTES)
                sample = leaf.detach().flatten()[::stride].cpu().contiguous()
                digest.update(f"{tuple(leaf.shape)}{zlib.crc32(sample.view(torch.uint8).numpy().tobytes())}".encode())
        error = ShapeError(
            "the ranks were given different batches; under torchrun every rank passes the same whole batch",
            hint="drop the DistributedSampler and seed a shuffling loader alike on all ranks: "
            "DataLoader(..., generator=torch.Generator().manual_seed(0))",
        )
        self._expect_equal(digest.digest(), error)

    @peers_told("before a step")
    def common_seed(self, seed: int) -> int:
        """Return rank 0's ``seed`` on every rank."""
        shared = torch.tensor([seed])
        dist.broadcast(shared, 0, group=self._group)
        return int(shared.item())

    def _sum_ties(self) -> None:
        """Add up the gradients of parameters that several stages share, over those stages."""
        for parameters, group, weight in self._ties:
            for parameter in parameters:
                present = torch.tensor([float(parameter.grad is not None)])
                dist.all_reduce(present, group=group)
                if not present.item():
                    continue
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad * weight
                total = gradient.cpu()
                dist.all_reduce(total, group=group)
                parameter.grad = total.to(parameter.device)

    def _share_buffers(self) -> None:
        """Let all replicas of a stage go on with the first one's buffers."""
        for s, reducer in self._executor.reducers.items():
            if isinstance(reducer, Replicas) and self._model.training:
                reducer.share_buffers(self._spec.layout.workers[s][0])

    def _gather(self, report: StepReport, request: StepRequest) -> StepReport:
        """Give losses, results and times to every rank."""
        last = self._spec.layout.n_stages - 1
        # Every rank speaks for its own stages.
        whole = StepReport(whole_because=report.whole_because, counts=report.counts)
        if request.want_loss or self._look:
            self._sum_up(report, request, whole)
        if request.want_outputs:
            for m in range(request.n_microbatches):
                whole.outputs[m] = self._broadcast_output(report.outputs.get(m), self._spec.layout.worker_of(last, m))
        if request.profile:
            whole.spans = self._gather_spans(report)
        return whole

    def _sum_up(self, report: StepReport, request: StepRequest, whole: StepReport) -> None:
        """Give every rank the losses, how busy each was, and the first value that is not finite: in one message."""
        n, n_workers = request.n_microbatches, self._spec.layout.n_workers
        table = torch.zeros(2 * (n + n_workers), dtype=torch.float64)
        losses, ranks = table[: 2 * n].view(n, 2), table[2 * n :].view(n_workers, 2)
        for m, loss in report.losses.items():
            losses[m, 0], losses[m, 1] = loss.double().item(), _LOSS_DTYPES.index(loss.dtype)
        ranks[self._worker, 0] = report.counts[self._worker].busy_s
        ranks[self._worker, 1] = float(report.nonfinite is not None)
        dist.all_reduce(table, group=self._group)
        if request.want_loss:
            whole.losses = {m: losses[m, 0].to(_LOSS_DTYPES[int(losses[m, 1])]) for m in range(n)}
        whole.busy_s = dict(enumerate(ranks[:, 0].tolist()))
        if bool(ranks[:, 1].any()):
            texts = gathered(
                json.dumps([] if report.nonfinite is None else [to_json(report.nonfinite)]), self._timeout_s
            )
            whole.nonfinite = first_of(from_json(NonFinite, item) for text in texts for item in json.loads(text))

    def _broadcast_output(self, output: Any, owner: int) -> Any:
        _, structure = self._spec.stages[-1].result(self._model.training)
        packet = torch.empty(0, dtype=torch.uint8)
        if owner == self._worker:
            leaves, found = flatten(output)
            if found != structure or not is_encodable(leaves):
                raise StageError(
                    "the model's result cannot be sent to the other ranks: it holds more than tensors and scalars"
                )
            packet = encode(leaves, [False] * len(leaves))
        size = torch.tensor([packet.numel()])
        dist.broadcast(size, owner, group=self._group)
        if owner != self._worker:
            packet = torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(packet, owner, group=self._group)
        return unflatten(structure, decode(packet, torch.device("cpu"))[0])

    def _gather_spans(self, report: StepReport) -> list[Span]:
        rows = [[s.worker, _OPS.index(s.op), s.stage, s.microbatch, s.start_s, s.end_s] for s in report.spans]
        count = torch.tensor([len(rows)])
        counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, count, group=self._group)
        longest = max(int(c.item()) for c in counts)
        mine = torch.full((longest, 6), -1.0, dtype=torch.float64)
        if rows:
            mine[: len(rows)] = torch.tensor(rows, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(everyone, mine, group=self._group)
        return [
            Span(int(row[0]), _OPS[int(row[1])], int(row[2]), int(row[3]), row[4], row[5])
            for table, c in zip(everyone, counts)
            for row in table[: int(c.item())].tolist()
        ]

    def forget(self, call: int) -> None:
        """Drop the activations of a forward whose backward will not come."""
        self._executor.forget(call)

    @peers_told("while it collected the model")
    def full_state(self) -> dict[str, torch.Tensor]:
        """Collect every parameter and buffer on every rank (a collective call)."""
        self._process.check("the whole model's state")
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self._by_name.items():
            owner = self._owner[name]
            if owner < 0:
                state[name] = tensor.detach().cpu()
                continue
            held = dense(tensor.detach()).cpu().contiguous()
            data = held.clone() if owner == self._worker else torch.empty(self._shapes[name], dtype=tensor.dtype)
            dist.broadcast(data, owner, group=self._group)
            state[name] = data
        return {name: state[self._names[id(tensor)]] for name, tensor in model_state(self._model).items()}

    @peers_told("while it measured the gradients")
    def gradient_norm(self, norm_type: float) -> torch.Tensor:
        """Return the norm of the gradients of all ranks, each parameter counted on one of them (a collective call)."""
        self._process.check("the norm of all gradients")
        mine = [
            t
            for name, t in self._owned
            if isinstance(t, nn.Parameter) and self._owner[name] == self._worker and not hasattr(t, "full_tensor")
        ]
        norms = [own_norm(mine, norm_type)]
        for reducer in self._sharding:  # which all replicas measure together, and the first one counts
            whole = own_norm(reducer.sharded.values(), norm_type)
            norms.append(whole if reducer.is_first else torch.zeros_like(whole))
        own = torch.linalg.vector_norm(torch.stack([norm.double().cpu() for norm in norms]), norm_type)

        def all_reduce(total: torch.Tensor, how: str) -> None:
            dist.all_reduce(total, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group=self._group)

        return joined_norm(own, norm_type, all_reduce)

    def local_parameters(self) -> list[nn.Parameter]:
        """List the parameters of this rank's stages, each once."""
        mine = {id(parameter) for stage in self._executor.stages.values() for parameter in stage.module.parameters()}
        return [tensor for _, tensor in self._owned if isinstance(tensor, nn.Parameter) and id(tensor) in mine]

    def load_state(self, state_dict: Mapping[str, Any], strict: bool) -> Any:
        """Load the entries that this rank owns, after checking names and shapes of all.

        Raises:
            CheckpointError: a name is missing or unknown (``strict``), or a shape differs.
        """
        known = set(self._model.state_dict())
        missing, unexpected = sorted(known - set(state_dict)), sorted(set(state_dict) - known)
        if strict and (missing or unexpected):
            raise CheckpointError(f"state dict does not fit the model: missing {missing}, unexpected {unexpected}")
        aliases = {name: self._names[id(tensor)] for name, tensor in model_state(self._model).items()}
        for name in known & set(state_dict):
            expected = self._shapes[aliases[name]]
            if tuple(state_dict[name].shape) != tuple(expected):
                raise CheckpointError(f"{name}: expected shape {tuple(expected)}, got {tuple(state_dict[name].shape)}")
        with torch.no_grad():
            for name, tensor in self._owned:
                sources = [alias for alias, first in aliases.items() if first == name and alias in state_dict]
                if sources:
                    load(tensor, state_dict[sources[0]])
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    @cached_property
    def peers(self) -> Ranks:
        """Return the ranks as those who write and read checkpoints; a call that all ranks make."""
        return Ranks(self._timeout_s)

    def placement(self) -> Placement:
        """Say what this rank writes of a checkpoint: what it is the first to own; rank 0 what no stage uses."""
        rank = self._worker
        mine = [name for name, _ in self._owned if self._owner[name] == rank or (self._owner[name] < 0 and rank == 0)]
        return Placement({f"rank-{rank:04d}": mine}, {name for name, _ in self._owned}.__contains__)

    def program_of(self, request: StepRequest) -> Program:
        """Return the program that a request runs."""
        return self._programs.get(self._programs.key_of(request))

    def positions(self) -> dict[int, int]:
        """Return where this rank is among its instructions."""
        return {self._worker: self._executor.position}

    def residents(self) -> dict[int, Resident]:
        """Return this process; other ranks know of theirs."""
        return {self._worker: resident(self._spec.devices[self._worker])}

    def gathered(self, text: str) -> list[str]:
        """Return the text of every rank (a collective call)."""
        return gathered(text, self._timeout_s)

    def close(self) -> None:
        """Give up the channels and the process groups; the ranks belong to torchrun."""
        if self._is_open and isinstance(self._transport, RoutedTransport):
            self._transport.close()
        self._is_open = False
        for name in ("_transport", "_executor", "_sharding", "_ties", "_group", "replica_group", "peers"):
            self.__dict__.pop(name, None)
