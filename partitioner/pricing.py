"""The price of a captured graph at one microbatch size: facts, costs, and the graph that the cut is searched on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx
import torch

from ..errors import ConstraintError
from ..structure import is_encodable
from .analysis import OpFacts, analyse
from .captured import Capture
from .cluster import Cluster, DeviceKind
from .copies import cone, copyable
from .costs.analytic import analytic_call, analytic_costs
from .costs.measured import can_measure, measured_call, measured_costs, touched_bytes
from .costs.op_cost import FREE, OpCost
from .loss import Loss, LossCall, loss_seconds
from .opgraph import OpNode, op_graph

Progress = Callable[[str, int, int], None]
Corrections = Mapping[str, tuple[float, float]]  # per op: factors of its forward and its backward
SOURCES = ("measured", "analytic")


def silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Priced:
    """A captured graph with facts and costs at one microbatch size.

    Attributes:
        rows: samples of a microbatch.
        n_threads: CPU threads that each worker computes with.
        facts: what each op does.
        costs: per name of a device kind, the cost of each op.
        graph: what the cut is searched on.
        loss_s: per name of a device kind, seconds of the loss's forward and backward.
        optimizer: the optimizer whose step is part of a training step, if one is.
    """

    rows: int
    n_threads: int
    facts: dict[str, OpFacts]
    costs: dict[str, dict[str, OpCost]]
    graph: nx.DiGraph
    loss_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    optimizer: str | None = None

    @property
    def ops(self) -> dict[str, OpNode]:
        """Return the ops by name, in graph order."""
        return {name: self.graph.nodes[name]["op"] for name in self.graph.nodes}

    def work_s(self, kind: str) -> float:
        """Return the seconds that one microbatch takes on one device of a kind."""
        return sum(map(_seconds, self.costs[kind].values())) + sum(self.loss_s.get(kind, ()))


class Pricer:
    """Prices a captured graph for a cluster, each microbatch size and thread count once."""

    def __init__(
        self,
        capture: Capture,
        tensors: Sequence[torch.Tensor],
        cluster: Cluster,
        source: str = "measured",
        progress: Progress = silent,
        corrections: Corrections | None = None,
        loss: Loss | None = None,
        optimizer: str | None = None,
        onednn: bool = False,
    ) -> None:
        """Take the tensor leaves of an example call.

        ``corrections`` multiply the costs of ops, as a profile of whole stages asks for; ``loss`` is priced too. With
        ``onednn`` large products are measured as oneDNN computes them.

        Raises:
            ConstraintError: ``source`` is not ``"measured"`` or ``"analytic"``.
        """
        if source not in SOURCES:
            raise ConstraintError(f"costs must be 'measured' or 'analytic', got {source!r}")
        self._capture, self._tensors, self._cluster = capture, list(tensors), cluster
        self._source, self._progress, self._corrections = source, progress, corrections or {}
        self._loss, self._optimizer, self._onednn = loss, optimizer, onednn
        self._facts: dict[int, dict[str, OpFacts]] = {}
        self._known: dict[tuple[int, int], Priced] = {}
        self._warned: set[str] = set()

    def at(self, rows: int, n_threads: int = 1) -> Priced:
        """Return the price of a microbatch of ``rows`` samples, on workers with so many CPU threads each.

        Raises:
            Exception: what the model itself raises at that size.
        """
        if (rows, n_threads) not in self._known:
            facts = self.facts(rows)
            costs = {kind.name: self._corrected(facts, rows, kind, n_threads) for kind in self._cluster.kinds}
            loss_s = {kind.name: self._loss_s(facts, rows, kind, n_threads) for kind in self._cluster.kinds}
            travels = {name: is_encodable(own.value) for name, own in facts.items()}
            graph = op_graph(self._capture, facts, self._with_loss(costs, loss_s), self._cluster, travels)
            _price_copies(self._capture, facts, costs, graph)
            self._known[rows, n_threads] = Priced(rows, n_threads, facts, costs, graph, loss_s, self._optimizer)
        return self._known[rows, n_threads]

    def is_known(self, rows: int, n_threads: int) -> bool:
        """Say whether that size has its price already."""
        return (rows, n_threads) in self._known

    def facts(self, rows: int) -> dict[str, OpFacts]:
        """Return the facts of every op at ``rows`` samples, which cost little."""
        if rows not in self._facts:
            self._facts[rows] = analyse(self._capture, self._tensors, rows)
        return self._facts[rows]

    def _loss_s(self, facts: Mapping[str, OpFacts], rows: int, kind: DeviceKind, n_threads: int) -> tuple[float, float]:
        if self._loss is None:
            return 0.0, 0.0
        measured = self._why_analytic(kind) is None
        touched = touched_bytes(self._capture.graph_module, facts)

        def price(call: LossCall) -> tuple[float, float]:
            if measured:
                return measured_call(call, kind, n_threads, touched_bytes=touched)
            return analytic_call(call, _with_threads(kind, n_threads))

        return loss_seconds(self._loss, self._capture, facts, rows, price)

    def _with_loss(
        self, costs: Mapping[str, dict[str, OpCost]], loss_s: Mapping[str, tuple[float, float]]
    ) -> dict[str, dict[str, OpCost]]:
        """Add the loss to the last op of the result, where the cut will find it."""
        results = {leaf.node for leaf in self._capture.outputs if leaf.node is not None}
        named = {kind: [name for name in own if name in results] for kind, own in costs.items()}
        changed = {}
        for kind, own in costs.items():
            forward_s, backward_s = loss_s[kind]
            changed[kind] = dict(own)
            if named[kind] and forward_s + backward_s > 0:
                last = own[named[kind][-1]]
                changed[kind][named[kind][-1]] = replace(
                    last, forward_s=last.forward_s + forward_s, backward_s=last.backward_s + backward_s
                )
        return changed

    def _corrected(
        self, facts: Mapping[str, OpFacts], rows: int, kind: DeviceKind, n_threads: int
    ) -> dict[str, OpCost]:
        costs = self._costs(facts, rows, kind, n_threads)
        for name, (forward, backward) in self._corrections.items():
            if name in costs:
                own = costs[name]
                costs[name] = replace(
                    own,
                    forward_s=own.forward_s * forward,
                    backward_s=own.backward_s * backward,
                    backward_weight_s=own.backward_weight_s * backward,
                )
        return costs

    def _costs(self, facts: Mapping[str, OpFacts], rows: int, kind: DeviceKind, n_threads: int) -> dict[str, OpCost]:
        module = self._capture.graph_module
        why = self._why_analytic(kind)
        if why is None:

            def tell(done: int, total: int) -> None:
                threads = "" if n_threads == 1 else f" with {n_threads} threads"
                self._progress(f"measuring ops at {rows} rows{threads}", done, total)

            return measured_costs(
                module,
                dict(facts),
                kind,
                n_threads,
                touched_bytes=touched_bytes(module, facts),
                progress=tell,
                onednn=self._onednn,
            )
        if self._source == "measured" and not self._cluster.simulated and why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"stagecut: {why}; costs are the roofline of {kind.name}", stacklevel=2)
        return analytic_costs(module, dict(facts), _with_threads(kind, n_threads))

    def _why_analytic(self, kind: DeviceKind) -> str | None:
        """Say why costs of a kind cannot be measured here, or None."""
        if self._source == "analytic" or self._cluster.simulated:
            return "analytic costs were asked for"
        if any(parameter.is_meta for parameter in self._capture.model.parameters()):
            return "parameters are on the meta device"
        return can_measure(kind)


def _with_threads(kind: DeviceKind, n_threads: int) -> DeviceKind:
    """Let a CPU of one thread compute and move data so many times as fast; other kinds are as they are."""
    if kind.name != "cpu" or n_threads == 1:
        return kind
    rates = {dtype: rate * n_threads for dtype, rate in kind.flops_per_s.items()}
    return replace(kind, flops_per_s=rates, bytes_per_s=kind.bytes_per_s * n_threads)


def _price_copies(
    capture: Capture, facts: Mapping[str, OpFacts], costs: Mapping[str, Mapping[str, OpCost]], graph: nx.DiGraph
) -> None:
    """Note which ops may run on several stages; a value made of inputs alone costs no more than making it again."""
    may_copy = copyable(capture, facts, graph.graph["together"])
    graph.graph["copyable"] = may_copy
    ops = {name: graph.nodes[name]["op"] for name in graph.nodes}
    for transfer in graph.graph["transfers"]:
        again, sent = cone(transfer["nodes"][0], ops, may_copy, lambda name: False)
        if again and not sent:
            made_s = max(sum(_seconds(own.get(name, FREE)) for name in again) for own in costs.values())
            transfer["seconds"] = min(transfer["seconds"], made_s)


def _seconds(cost: OpCost) -> float:
    return cost.forward_s + cost.backward_s
