"""A stage at work: its ops as one compiled torch.fx module, forward and backward of single microbatches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..errors import ShapeError
from ..randomness import kept_random_state
from ..structure import flatten, map_leaves, unflatten
from .apart import Apart, backward_input
from .batchnorm import in_mode, leave_out_of_compilation
from .deferred import DeferredBatchNorm
from .explicit import Explicit
from .options import StageOptions
from .program.calls import Folded
from .program.specs import NodeRecord, NodeRef, StageSpec
from .recompute import recomputed
from .seeding import MethodCall, Seed, Seeded
from .sinks import Arm
from .synced import Rounds

_PLAIN = StageOptions()


def build_module(
    spec: StageSpec,
    seed: Seed,
    training: Callable[[str], bool] = lambda path: True,
    device: torch.device | None = None,
) -> fx.GraphModule:
    """Compile the stage's records into a module that takes (graph inputs…, wire values…) and returns its results.

    The results are a dict from node name to value, for every value that leaves the stage or is reported; None for one
    that is not computed in this mode. ``training`` tells the mode of a module of the user's model by path.
    """
    graph = fx.Graph()
    moves = None if device is None or spec.captured_on is None else (torch.device(spec.captured_on), device)
    modules = spec.modules if moves is None else {path: _moved(module, *moves) for path, module in spec.modules.items()}
    root: dict[str, Any] = {**modules, **{name: _there(value, device) for name, value in spec.attributes.items()}}
    known: dict[str, Any] = {name: graph.placeholder(_safe(name)) for name in input_names(spec)}

    def resolve(value: Any) -> Any:
        if isinstance(value, NodeRef):
            if value.name not in known:
                raise ShapeError(
                    f"modules of the model are in modes in which it was not captured: {value.name} is not computed",
                    hint="put the whole model into one mode: model.train() or model.eval()",
                )
            return known[value.name]
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)([resolve(item) for item in value])
        if isinstance(value, dict):
            return {key: resolve(item) for key, item in value.items()}
        if isinstance(value, torch.device) and moves is not None:
            return _device_for(value, *moves)
        if isinstance(value, slice):
            return slice(resolve(value.start), resolve(value.stop), resolve(value.step))
        return value

    for record in spec.nodes:
        if record.only is not None and training(record.only[0]) != record.only[1]:
            continue
        if record.op == "switch":
            known[record.name] = resolve(record.args[0 if training(record.target) else 1])
            continue
        op, target, args = record.op, record.target, resolve(record.args)
        if record.random:
            op, target = "call_module", _seed_op(record, root, seed)
        known[record.name] = graph.create_node(op, target, args, resolve(record.kwargs), name=_safe(record.name))
    graph.output({name: known.get(name) for name in result_names(spec)})
    return fx.GraphModule(root, graph, class_name=f"Stage{spec.index}")


def _there(value: Any, device: torch.device | None) -> Any:
    """Bring a constant of the graph to the stage's device; the model's own tensors are there."""
    elsewhere = isinstance(value, torch.Tensor) and device is not None and value.device.type != device.type
    return value.to(device) if elsewhere else value


def _device_for(named: torch.device, captured_on: torch.device, device: torch.device) -> torch.device:
    """Return the device that an op means by the one that the model was captured on."""
    same = named.type == captured_on.type and named.index in (None, captured_on.index)
    return device if same else named


def _moved(module: nn.Module, captured_on: torch.device, device: torch.device) -> nn.Module:
    """Let the ops inside a folded module mean ``device`` too; everything else is as it was."""
    if not isinstance(module, Folded) or captured_on == device:
        return module

    def move(leaf: Any) -> Any:
        return _device_for(leaf, captured_on, device) if isinstance(leaf, torch.device) else leaf

    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in module.body.graph.nodes:
        made: Any = graph.node_copy(node, known.__getitem__)
        made.args, made.kwargs = (fx.node.map_aggregate(value, move) for value in (made.args, made.kwargs))
        known[node] = made
    return module.with_body(fx.GraphModule(module.body, graph))


def _safe(name: str) -> str:
    return name.replace(".", "_")


def _seed_op(record: NodeRecord, root: dict[str, Any], seed: Seed) -> str:
    if record.op == "call_module":
        function = root[record.target]
    elif record.op == "call_method":
        function = MethodCall(record.target)
    else:
        function = record.target
    path = f"_seeded_{_safe(record.name)}"
    root[path] = Seeded(seed, record.name, function)
    return path


def input_names(spec: StageSpec) -> tuple[str, ...]:
    """List what the stage's module takes: graph inputs, then the values of each incoming packet."""
    return spec.graph_inputs + tuple(value for group in spec.wires_in for value in group.values)


def result_names(spec: StageSpec) -> tuple[str, ...]:
    """List what the stage's module returns: values for other stages, then values of the model's result."""
    inputs = set(input_names(spec))
    names = [value for group in spec.wires_out for value in group.values]
    reported = spec.outputs + (spec.evaluated[0] if spec.evaluated else ())
    names += [leaf.node for leaf in reported if leaf.node is not None and leaf.node not in inputs]
    return tuple(dict.fromkeys(names))


@dataclass
class Held:
    """What a stage keeps of one microbatch between its forward and its FREE."""

    results: dict[str, Any] = field(default_factory=dict)
    leaves: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    loss: torch.Tensor | None = None
    apart: Apart | None = None


class StageRuntime:
    """One stage on one worker.

    ``loss_fn`` is called as ``loss_fn(output, target)`` on the last stage; without one the model's own loss is taken
    from its result (a 0-dim tensor, or ``result.loss`` / ``result["loss"]``). With ``steady`` training steps that come
    up again and again are recorded (see :class:`Explicit`), unless they are compiled by ``torch.compile``. Deferred
    BatchNorms keep their running statistics until :meth:`update_statistics`; synced ones exchange theirs in ``rounds``,
    which a stage has that has replicas.
    """

    def __init__(
        self,
        spec: StageSpec,
        device: torch.device,
        loss_fn: Callable[..., Any] | None,
        options: StageOptions = _PLAIN,
        *,
        steady: bool = False,
        rounds: Rounds | None = None,
    ) -> None:
        self.spec = spec
        self.device = device
        self.loss_fn = loss_fn
        self.seed = Seed()
        exchange = None if rounds is None else lambda: rounds.exchange(self.seed.microbatch)
        self._built = in_mode(spec, options.batchnorm, exchange)
        self._rounds = rounds
        self._norms = [m for m in self._built.modules.values() if isinstance(m, DeferredBatchNorm)]
        self.module = build_module(self._built, self.seed, device=device)
        self._deciding = spec.deciding
        self._modes = (True,) * len(self._deciding)
        self._variants: dict[tuple[bool, ...], fx.GraphModule] = {self._modes: self.module}
        self.held: dict[int, Held] = {}
        self._whole_because = self._apart_from_recording(options)
        self.steady = steady and self._whole_because is None
        self._compiler = options.compiler
        self._compiled: dict[int, Callable[..., Any]] = {}
        self.explicit = Explicit(self.seed, options.fuses_accumulation, options.onednn_matmul)
        self._changed = True  # since begin() last looked at the modules

    @property
    def whole_because(self) -> str | None:
        """Say why a backward of this step ran whole that was to run in two parts, if one did."""
        return self.explicit.why_not

    def _apart_from_recording(self, options: StageOptions) -> str | None:
        """Say why this stage is never recorded, if so."""
        if self.spec.recompute:
            return "it computes its activations again"
        if options.compiler is not None:
            return "torch.compile makes one backward of it (compile_stages)"
        if self._rounds is not None:
            return "its BatchNorms exchange statistics with those of other replicas (batchnorm='sync')"
        return None

    def begin(self, splits: bool, trains: bool, n_microbatches: int) -> None:
        """Prepare for a step.

        Args:
            splits: whether its program computes input and weight gradients apart.
            trains: whether it is a whole training step.
            n_microbatches: how many it has, over all replicas.
        """
        if self._rounds is not None:
            self._rounds.begin(n_microbatches)
        # A worker process has modules of its own, which only modes change; elsewhere they are the user's.
        if self._changed or not self.explicit.slots:
            self.explicit.look_at(self._variant())
            self._changed = False
        self.explicit.begin(splits and self._whole_because is None, trains and self.steady)
        if splits:
            self.explicit.why_not = self._whole_because

    def forward(self, m: int, graph_inputs: dict[str, Any], packets: dict[str, tuple[Any, bool]]) -> Held:
        """Compute microbatch ``m``: ``packets`` holds (value, gradient wanted) for each incoming wire value."""
        held = Held()
        values = [map_leaves(self._to_device, graph_inputs[name]) for name in self.spec.graph_inputs]
        for group in self.spec.wires_in:
            for name in group.values:
                value, wanted = packets[name]
                held.leaves[name] = _as_leaf(value) if wanted and torch.is_grad_enabled() else value
                values.append(held.leaves[name])
        self.seed.microbatch = m
        held.results, held.apart = self._compute(m, values)
        self.held[m] = held
        if self.spec.is_last:
            held.output = self._output(held, dict(zip(input_names(self.spec), values)))
        return held

    def _compute(self, m: int, values: list[Any]) -> tuple[dict[str, Any], Apart | None]:
        module = self._variant()
        run = self._ready(module)
        if self.spec.recompute and torch.is_grad_enabled():
            return recomputed(module, run, self.seed, m, values), None
        return self.explicit.forward(module, values) or (run(*values), None)

    def _ready(self, module: fx.GraphModule) -> Callable[..., Any]:
        """Return what runs a module: itself, or what ``torch.compile`` makes of it."""
        if self._compiler is None:
            return module.forward
        if id(module) not in self._compiled:
            leave_out_of_compilation(module)
            self._compiled[id(module)] = torch.compile(module, backend=self._compiler)
        return self._compiled[id(module)]

    def _variant(self) -> fx.GraphModule:
        """Choose the ops that run in the present modes; all variants share the stage's modules."""
        if self._modes not in self._variants:
            training = dict(zip(self._deciding, self._modes)).__getitem__
            self._variants[self._modes] = build_module(self._built, self.seed, training, self.device)
        return self._variants[self._modes]

    def _to_device(self, leaf: Any) -> Any:
        return leaf.to(self.device) if isinstance(leaf, torch.Tensor) else leaf

    def _output(self, held: Held, inputs: dict[str, Any]) -> Any:
        known = {**inputs, **held.results}
        outputs, structure = self.spec.result(self._modes[self._deciding.index("")])
        leaves = [leaf.constant if leaf.node is None else known[leaf.node] for leaf in outputs]
        return unflatten(structure, leaves)

    def named_output(self, m: int) -> list[tuple[str, Any]]:
        """Pair each leaf of the model's result of microbatch ``m`` with the op that made it (last stage only)."""
        outputs, _ = self.spec.result(self._modes[self._deciding.index("")])
        return [(leaf.node or "output", value) for leaf, value in zip(outputs, flatten(self.held[m].output)[0])]

    def compute_loss(self, m: int, target: Any) -> torch.Tensor:
        """Compute the loss of microbatch ``m`` (last stage only)."""
        held = self.held[m]
        if self.loss_fn is None:
            held.loss = loss_of(held.output)
        else:
            held.loss = self.loss_fn(held.output, map_leaves(self._to_device, target))
        loss = held.loss
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be a 0-dim tensor (a mean over the microbatch), got {what}")
        return loss

    def backward(
        self, m: int, roots: list[torch.Tensor], gradients: list[torch.Tensor | None], arm: Arm | None = None
    ) -> None:
        """Add the gradients of microbatch ``m`` to the stage's parameters and to its incoming values.

        ``arm`` is called right before gradients reach the parameters, with the roots of the graph that they come by.
        """
        apart = self.held[m].apart
        if apart is not None:
            self.explicit.backward(apart, roots, gradients, arm)
            return
        if arm is not None:
            arm(roots)
        pairs = [(root, gradient) for root, gradient in zip(roots, gradients) if root.requires_grad]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])

    def backward_input(self, m: int, roots: list[torch.Tensor], gradients: list[torch.Tensor | None]) -> None:
        """Give the incoming values of microbatch ``m`` their gradients; the whole backward where it cannot be split."""
        apart = self.held[m].apart
        if apart is None:
            self.backward(m, roots, gradients)
        else:
            backward_input(apart, roots, gradients)

    def backward_weight(self, m: int, arm: Arm | None = None) -> None:
        """Add to the stage's parameters what :meth:`backward_input` left out of microbatch ``m``."""
        apart = self.held[m].apart
        if apart is not None:
            self.explicit.backward_weight(apart, arm)

    def input_gradients(self, m: int, producer: int) -> list[Any]:
        """Return the gradients for the packet that came from stage ``producer``, None where there is none."""
        group = next(group for group in self.spec.wires_in if group.stage == producer)
        return [map_leaves(_gradient_of, self.held[m].leaves[name]) for name in group.values]

    def roots_with_gradients(
        self, m: int, incoming: dict[int, list[Any]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Pair the results that other stages used with the sum of the gradients that came back for them."""
        results = self.held[m].results
        total: dict[str, list[torch.Tensor | None]] = {}
        for group in self.spec.wires_out:
            for name, gradient in zip(group.values, incoming.get(group.stage, [None] * len(group.values))):
                parts = _flat_gradients(gradient, len(flatten(results[name])[0]))
                known = total.get(name)
                total[name] = parts if known is None else [_add(a, b) for a, b in zip(known, parts)]
        roots: list[torch.Tensor] = []
        gradients: list[torch.Tensor | None] = []
        for name, parts in total.items():
            for tensor, part in zip(flatten(results[name])[0], parts):
                if part is not None and isinstance(tensor, torch.Tensor):
                    roots.append(tensor)
                    gradients.append(part)
        return roots, gradients

    def free(self, m: int) -> None:
        """Drop everything held of microbatch ``m``."""
        self.held.pop(m, None)

    def take_statistics(self) -> torch.Tensor | None:
        """Return what deferred BatchNorms have seen since the last time, as one row of numbers; None without any."""
        return torch.cat([norm.take() for norm in self._norms]) if self._norms else None

    def update_statistics(self, of_replicas: Sequence[torch.Tensor]) -> None:
        """Move running statistics towards what all replicas have seen: their rows, in their order."""
        sizes = [1 + 2 * norm.norm.num_features for norm in self._norms]
        for norm, *seen in zip(self._norms, *(torch.split(row, sizes) for row in of_replicas)):
            norm.update(seen)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the stage's parameters by their path in the stage's module, each once."""
        return dict(self.module.named_parameters())

    def set_modes(self, modes: dict[str, bool]) -> None:
        """Put leaf modules, and what is inside them, into the mode of their owners in the user's model."""
        self._changed = True
        self._modes = tuple(modes[path] for path in self._deciding)
        for path, owner in self.spec.mode_owners.items():
            held = self.spec.modules[path]
            body = held.body if isinstance(held, Folded) else held
            for inner, module in body.named_modules():
                full = ".".join(part for part in (owner, inner) if part)
                module.training = modes.get(full, self._modes[self._deciding.index("")])


def settle_statistics(
    stages: Mapping[int, StageRuntime], gather: Callable[[int, torch.Tensor], Sequence[torch.Tensor]]
) -> None:
    """Let the deferred BatchNorms of a worker's stages move, after a step.

    ``gather(stage, row)`` returns the rows of all replicas of the stage, in their order; this one's is ``row``.
    """
    for s, stage in sorted(stages.items()):
        seen = stage.take_statistics()
        if seen is not None:
            stage.update_statistics(gather(s, seen))


@contextlib.contextmanager
def isolated_randomness(enabled: bool) -> Iterator[None]:
    """Keep the process's random state as it was (for stages that run inside the user's process)."""
    if not enabled:
        yield
        return
    with kept_random_state():
        yield


def loss_of(output: Any) -> Any:
    """Find the loss in a model's own result."""
    if isinstance(output, torch.Tensor):
        return output
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if found is None:
        raise ValueError(
            f"no loss_fn was given and the model's result ({type(output).__name__}) has no 'loss': "
            "pass stagecut.compile(..., loss_fn=...)"
        )
    return found


def _as_leaf(value: Any) -> Any:
    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor) and (item.is_floating_point() or item.is_complex()):
            return item.detach().requires_grad_()
        return item

    return map_leaves(leaf, value)


def _gradient_of(leaf: Any) -> Any:
    return leaf.grad if isinstance(leaf, torch.Tensor) and leaf.requires_grad else None


def _flat_gradients(gradient: Any, count: int) -> list[torch.Tensor | None]:
    return [None] * count if gradient is None else flatten(gradient)[0]


def _add(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
