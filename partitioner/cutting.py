"""The cut of a priced graph for given groups of devices: which op on which stage, and who computes again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import networkx as nx

from ..errors import InfeasibleError
from ..runtime.instructions import Layout
from .assemble import in_flight_of
from .cluster import Cluster
from .cut import Cut, CutDevice, solve
from .pricing import Priced

Recompute = Literal["never", "choose", "always"]


@dataclass(frozen=True)
class Stages:
    """The stage of each op, and which stages compute their activations again."""

    stage_of: dict[str, int]
    recompute: tuple[bool, ...]
    cut: Cut | None = None


class Cutter:
    """Cuts for groups of devices; the same question is answered once."""

    def __init__(self, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._known: dict[tuple[object, ...], Cut | InfeasibleError] = {}

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
        held = in_flight_of(Layout(cluster.groups, (), ()), schedule, n_pieces)
        most_bytes = _most_bytes(priced.graph, max(held))
        limits = [limit if limit < most_bytes else float("inf") for limit in limits]
        binding = min(limits) < float("inf")
        kinds = tuple(_kind(priced, cluster, group) for group in cluster.groups)
        sizes = tuple(len(group) for group in cluster.groups)
        if not binding and recompute == "choose":
            recompute = "never"
        key = (id(priced), kinds, sizes, tuple(held) if binding else None, tuple(limits), recompute)
        cut = self._known.get(key)
        if cut is None or (diagnose and isinstance(cut, InfeasibleError)):
            try:
                cut = self._solve(priced.graph, _names(cluster), kinds, sizes, limits, held, recompute, diagnose)
            except InfeasibleError as error:
                cut = error
            self._known[key] = cut
        if isinstance(cut, InfeasibleError):
            raise cut
        stage_of = {str(op): stage for op, stage in cut.stage_of.items()}
        return Stages(stage_of, cut.recompute, cut)

    def _solve(
        self,
        graph: nx.DiGraph,
        stages: Sequence[str],
        kinds: Sequence[str],
        sizes: Sequence[int],
        limits: Sequence[float],
        held: Sequence[int],
        recompute: Recompute,
        diagnose: bool,
    ) -> Cut:
        graph, names = _shared_by_replicas(graph, kinds, sizes)
        devices = [
            CutDevice(stage, name, None if limit == float("inf") else limit)
            for stage, name, limit in zip(stages, names, limits)
        ]
        cut = solve(
            graph,
            devices,
            ordered=True,
            in_flight=held,
            recompute=recompute,
            time_limit_s=self._time_limit_s,
            diagnose=diagnose,
        )
        if len(set(sizes)) == 1:
            n = sizes[0]
            cut = replace(
                cut,
                loads_s=tuple(load / n for load in cut.loads_s),
                max_load=cut.max_load / n,
                lower_bound=cut.lower_bound / n,
            )
        return cut

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
