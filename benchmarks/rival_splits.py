"""Splits of a cost graph that other ways to balance a pipeline make: contiguous parts of the graph's own order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from typing import Any

import networkx as nx
import torch
from torch import nn

Weights = Mapping[Hashable, float]


def legal_places(graph: nx.DiGraph) -> list[int]:
    """List where the graph's order may be parted: before node ``p`` for each ``p``, no group of ``together`` torn.

    An edge that goes back in the order keeps all between its ends in one part. O(nodes + edges + sizes of groups).
    """
    index = {node: i for i, node in enumerate(graph)}
    reach = list(range(len(index)))
    spans = [[index[node] for node in group] for group in graph.graph.get("together", [])]
    spans += [[index[u], index[v]] for u, v in graph.edges if index[u] > index[v]]
    for span in spans:
        reach[min(span)] = max(reach[min(span)], *span)
    return [i + 1 for i, last in enumerate(accumulate(reach, max)) if last == i < len(index) - 1]


def nearest(values: Sequence[float], targets: Sequence[float]) -> list[int]:
    """Choose an increasing index for each target in turn, so that the value there is the nearest; of equals the last.

    Raises:
        ValueError: there are fewer values than targets.
    """
    if len(values) < len(targets):
        raise ValueError(f"{len(targets) + 1} stages, and only {len(values)} places where the order may be parted")
    chosen: list[int] = []
    for i, target in enumerate(targets):
        first = chosen[-1] + 1 if chosen else 0
        window = range(first, len(values) - (len(targets) - i) + 1)
        chosen.append(min(window, key=lambda p: (abs(values[p] - target), -p)))
    return chosen


def by_places(graph: nx.DiGraph, places: Sequence[int]) -> dict[Hashable, int]:
    """Return the stage of each node for parts of the order that begin at ``places``."""
    order, ends = list(graph), [0, *places, len(graph)]
    return {node: s for s, (begin, end) in enumerate(pairwise(ends)) for node in order[begin:end]}


def by_shares(graph: nx.DiGraph, weight_of: Weights, k: int) -> dict[Hashable, int]:
    """Part the order where the sums of ``weight_of`` come nearest to equal shares.

    Raises:
        ValueError: the order may be parted in fewer than ``k - 1`` places.
    """
    sums = [0.0, *accumulate(weight_of[node] for node in graph)]
    places = legal_places(graph)
    chosen = nearest([sums[p] for p in places], [sums[-1] * s / k for s in range(1, k)])
    return by_places(graph, [places[p] for p in chosen])


def parameter_counts(graph: nx.DiGraph, sizes: Mapping[str, int]) -> dict[Hashable, float]:
    """Count the parameters of each op; those that several ops use belong to the first."""
    left = dict(sizes)
    return {
        node: float(sum(left.pop(name, 0) for name in record["op"].parameters)) for node, record in graph.nodes.items()
    }


def by_block_partition(graph: nx.DiGraph, time_of: Weights, k: int) -> dict[Hashable, int]:
    """Part the order by torchgpipe's algorithm, given the times of the smallest pieces that may be parted.

    That is the finest ``nn.Sequential`` that could be made of the model. The algorithm: Barany and Grinberg, "Block
    partitions of sequences" (2013, https://arxiv.org/abs/1308.2452).

    Raises:
        ValueError: there are fewer pieces than stages, or a stage gets none, which torchgpipe refuses to run.
    """
    from torchgpipe.balance import blockpartition

    sums = [0.0, *accumulate(time_of[node] for node in graph)]
    bounds = [0, *legal_places(graph), len(graph)]
    times = [sums[end] - sums[begin] for begin, end in pairwise(bounds)]
    solve: Callable[..., Sequence[Sequence[float]]] = blockpartition.solve
    counts = [len(part) for part in solve(times, partitions=k)]
    if min(counts) == 0:
        raise ValueError(f"torchgpipe's balance has an empty part: {counts}")
    return by_places(graph, [bounds[p] for p in accumulate(counts[:-1])])


def sequential_layers(model: nn.Module, images: torch.Tensor) -> dict[str, nn.Module] | None:
    """Return a model's layers by path if it computes what they do one after the other, else None.

    Nested ``nn.Sequential`` are opened; what models write as functions before their first ``nn.Linear`` (or at the
    end, without one) is put there as layers. The example decides, in evaluation.
    """
    named = dict(_opened(model, ""))
    with torch.no_grad(), _evaluating(model):
        wanted = model(images)
        for between in _BETWEEN:
            layers = _with(named, between)
            with suppress(Exception):  # layers that do not fit one another may raise anything
                if torch.allclose(nn.Sequential(*layers.values())(images), wanted, rtol=1e-4, atol=1e-5):
                    return layers
    return None


_BETWEEN: tuple[tuple[nn.Module, ...], ...] = (
    (),
    (nn.Flatten(),),
    (nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
)


def _with(named: Mapping[str, nn.Module], between: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Put layers before the first linear one."""
    paths = list(named)
    first = next((i for i, layer in enumerate(named.values()) if isinstance(layer, nn.Linear)), len(paths))
    added = {f"({type(layer).__name__})": layer for layer in between}
    return {path: added[path] if path in added else named[path] for path in (*paths[:first], *added, *paths[first:])}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@contextmanager
def _not_in_place(model: nn.Module) -> Iterator[None]:
    """Let no layer write into its input, which ``balance_by_time`` gives it as a leaf of autograd."""
    in_place: list[Any] = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    for module in in_place:
        module.inplace = False
    try:
        yield
    finally:
        for module in in_place:
            module.inplace = True


def _opened(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        found += _opened(child, below) if type(child) is nn.Sequential else [(below, child)]
    return found


def layer_places(graph: nx.DiGraph, paths: Sequence[str], counts: Sequence[int]) -> list[int]:
    """Return where the order is parted by stages of so many layers each, moved to the nearest legal places.

    Raises:
        ValueError: the order may be parted in too few places.
    """
    ends = dict.fromkeys(paths, 0)
    for i, record in enumerate(graph.nodes.values()):
        path = record["op"].module_path
        while path and path not in ends:
            path = path.rpartition(".")[0]
        if path:
            ends[path] = i + 1
    reached = list(accumulate(ends.values(), max))
    places = legal_places(graph)
    chosen = nearest(places, [reached[n - 1] for n in list(accumulate(counts))[:-1]])
    return [places[p] for p in chosen]


def by_torchgpipe(
    graph: nx.DiGraph, layers: Mapping[str, nn.Module], images: torch.Tensor, k: int
) -> dict[Hashable, int]:
    """Part the order where torchgpipe's ``balance_by_time`` parts the layers, which it times itself.

    Raises:
        ValueError: there are fewer layers than stages, or a stage gets none.
    """
    from torchgpipe.balance import balance_by_time

    balance: Callable[..., list[int]] = balance_by_time
    model = nn.Sequential(*layers.values()).train()
    with _not_in_place(model):
        counts = balance(k, model, images, device=torch.device("cpu"))
    if min(counts) == 0:
        raise ValueError(f"torchgpipe's balance has an empty part: {counts}")
    return by_places(graph, layer_places(graph, list(layers), counts))
