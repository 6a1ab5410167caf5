"""The cut of a priced graph for given groups of devices: which op on which stage, and who computes again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import networkx as nx

from ..errors import InfeasibleError
from ..runtime.instructions import Layout
from .cluster import Cluster
from .cut import Cut, CutDevice, solve
from .pricing import Priced
from .residency import in_flight_of

Recompute = Literal["never", "choose", "always"]


@dataclass(frozen=True)
class Stages:
    """The stage of each op, and which stages compute their activations again."""

    stage_of: dict[str, int]
    recompute: tuple[bool, ...]
    cut: Cut | None = None


@dataclass(frozen=True)
class _Question:
    """A cut that is asked for: the same graph on the same kinds of devices, within limits."""

    about: tuple[object, ...]  # the priced graph, and per stage its kind and replicas
    held: tuple[int, ...]
    limits: tuple[float, ...]
    recompute: Recompute

    def is_relaxed_by(self, other: _Question) -> bool:
        """Say whether every cut that answers this one answers ``other`` too, with no larger load.

        So it is where ``other`` has nowhere a lower limit or more microbatches in flight, and may recompute as this one
        does: where it has no limits it never has to, and where it may choose, a stage that fits without recompute does
        without, and one that does not pays for it what it would pay here.
        """
        if self.about != other.about:
            return False
        unlimited = min(other.limits) == float("inf")
        if not unlimited and any(wider > own for own, wider in zip(self.held, other.held)):
            return False
        if any(wider < own for own, wider in zip(self.limits, other.limits)):
            return False
        return other.recompute in (self.recompute, "choose") or (unlimited and other.recompute == "never")


class Cutter:
    """Cuts for groups of devices; the same question is answered once, and what answers bound is handed on."""

    def __init__(self, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._known: dict[_Question, Cut | InfeasibleError] = {}  # loads of all replicas of a stage together

    def cut(
        self,
        priced: Priced,
        cluster: Cluster,
        schedule: str,
        n_pieces: int,
        recompute: Recompute,
        limits: Sequence[float],
        *,
        diagnose: bool = False,
    ) -> Stages:
        """Cut the graph into one stage for each group of ``cluster``, within ``limits`` bytes per stage.

        ``diagnose`` searches, where nothing fits, for what would.

        Raises:
            InfeasibleError: no cut fits.
        """
        assert cluster.groups is not None
        held = tuple(in_flight_of(Layout(cluster.groups, (), ()), schedule, n_pieces))
        most_bytes = _most_bytes(priced.graph, max(held))
        limits = tuple(limit if limit < most_bytes else float("inf") for limit in limits)
        binding = min(limits) < float("inf")
        kinds = tuple(_kind(priced, cluster, group) for group in cluster.groups)
        sizes = tuple(len(group) for group in cluster.groups)
        if not binding and recompute == "choose":
            recompute = "never"
        asked = _Question((id(priced), kinds, sizes), held if binding else (), limits, recompute)
        cut = self._known.get(asked)
        if cut is None or (diagnose and isinstance(cut, InfeasibleError)):
            try:
                cut = self._answer(priced.graph, _names(cluster), kinds, sizes, asked, held, diagnose)
            except InfeasibleError as error:
                cut = error
            self._known[asked] = cut
        if isinstance(cut, InfeasibleError):
            raise cut
        stage_of = {str(op): stage for op, stage in cut.stage_of.items()}
        return Stages(stage_of, cut.recompute, _of_one_replica(cut, sizes))

    def _answer(
        self,
        graph: nx.DiGraph,
        stages: Sequence[str],
        kinds: Sequence[str],
        sizes: Sequence[int],
        asked: _Question,
        held: Sequence[int],
        diagnose: bool,
    ) -> Cut:
        """Cut, unless a cut within wider limits is good here too; such cuts bound what this one can reach."""
        wider = {
            other: cut for other, cut in self._known.items() if isinstance(cut, Cut) and asked.is_relaxed_by(other)
        }
        for other, cut in wider.items():
            same = (other.held, other.recompute) == (asked.held, asked.recompute)
            if same and cut.optimal and all(n_bytes <= limit for n_bytes, limit in zip(cut.memory_bytes, asked.limits)):
                return cut
        graph, names = _shared_by_replicas(graph, kinds, sizes)
        devices = [
            CutDevice(stage, name, None if limit == float("inf") else limit)
            for stage, name, limit in zip(stages, names, asked.limits)
        ]
        return solve(
            graph,
            devices,
            ordered=True,
            in_flight=held,
            recompute=asked.recompute,
            time_limit_s=self._time_limit_s,
            diagnose=diagnose,
            at_least_s=max((cut.lower_bound for cut in wider.values()), default=0.0),
        )

    def unequal_groups(
        self,
        priced: Priced,
        cluster: Cluster,
        n_stages: int,
        n_pieces: int,
        modes: Sequence[Recompute],
        *,
        diagnose: bool = False,
    ) -> tuple[int, ...]:
        """Return the devices of each stage that make the smallest bottleneck with so many stages.

        ``modes`` are tried in turn until one has a cut; ``diagnose`` searches, where none has, for what would fit.

        Raises:
            InfeasibleError: none has.
        """
        devices = [
            CutDevice(f"device {i}", device.kind.name, device.kind.memory_bytes)
            for i, device in enumerate(cluster.devices)
        ]
        for mode in modes:
            try:
                cut = solve(
                    priced.graph,
                    devices,
                    ordered=True,
                    n_stages=n_stages,
                    max_replicas=cluster.n_devices - n_stages + 1,
                    in_flight="1f1b",
                    n_microbatches=n_pieces,
                    recompute=mode,
                    time_limit_s=self._time_limit_s,
                    diagnose=diagnose and mode == modes[-1],
                )
            except InfeasibleError as error:
                failure = error
            else:
                return cut.replicas
        raise InfeasibleError(f"{n_stages} stages of unequal replicas: {failure.message}", hint=failure.hint)


def _of_one_replica(cut: Cut, sizes: Sequence[int]) -> Cut:
    """Share the loads of the cut by the replicas, if all stages have as many; else its kinds are so much faster."""
    if len(set(sizes)) > 1:
        return cut
    n = sizes[0]
    return replace(
        cut,
        loads_s=tuple(load / n for load in cut.loads_s),
        max_load=cut.max_load / n,
        lower_bound=cut.lower_bound / n,
    )


def _kind(priced: Priced, cluster: Cluster, group: Sequence[int]) -> str:
    """Name the slowest kind of a group's devices."""
    return max(sorted({cluster.devices[index].kind.name for index in group}), key=priced.work_s)


def _names(cluster: Cluster) -> tuple[str, ...]:
    """Name each stage with its devices."""
    return tuple(
        f"stage {s} on {devices[0]}" + (f" and {len(devices) - 1} more" if len(devices) > 1 else "")
        for s, devices in enumerate(cluster.stages)
    )


def _most_bytes(graph: nx.DiGraph, in_flight: int) -> float:
    """Return the bytes that the whole graph would hold: a larger limit cannot bind."""
    total = 0.0
    for _, node in graph.nodes(data=True):
        total += node["memory_bytes"] + in_flight * node["stash_bytes"] + node.get("workspace_bytes", 0)
    for entry in graph.graph.get("shared", ()):
        total += entry.get("memory_bytes", 0) + in_flight * entry.get("stash_bytes", 0)
    return total


def _shared_by_replicas(
    graph: nx.DiGraph, kinds: Sequence[str], sizes: Sequence[int]
) -> tuple[nx.DiGraph, tuple[str, ...]]:
    """Give stages with more replicas a kind that is so many times as fast, where stages differ in that.

    Transfers of such stages are counted as if one replica paid them all, which the simulator corrects.
    """
    if len(set(sizes)) == 1:
        return graph, tuple(kinds)
    names = tuple(f"{kind}/{size}" for kind, size in zip(kinds, sizes))
    shared = graph.copy()
    for _, node in shared.nodes(data=True):
        for key in ("compute_s", "forward_s"):
            own = node.get(key, {})
            node[key] = {name: own.get(kind, 0.0) / size for name, kind, size in zip(names, kinds, sizes)}
    return shared, names
