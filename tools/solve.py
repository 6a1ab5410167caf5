"""The subcommand ``partition-viz solve``: cut a cost graph that is given as a node-link JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConstraintError, StagecutError
from ..records import finite
from .arguments import count, positive
from .json_file import read_json

if TYPE_CHECKING:
    import networkx as nx

    from ..partitioner.cut import Cut

_EXAMPLES = """examples:
  partition-viz solve graph.json
  partition-viz solve graph.json --json > cut.json
  partition-viz solve graph.json --max-chunks 2 --time-limit-s 10

the file is what networkx.node_link_data writes:
  nodes   "id", "compute_s" {kind: seconds}; may have "kinds", "memory_bytes", "stash_bytes", "pin"
  edges   "source", "target" (under "edges" or "links")
  graph   "devices" [{"name", "kind", "memory_bytes", "pays_transfers"}]; may have "transfers"
          [{"nodes", "seconds"}] and "together" [[node, ...]]

exit codes: 0 done, 2 wrong arguments or a bad file, 4 no cut fits
"""


def add_solve(commands: Any) -> None:
    """Add the subcommand's parser."""
    parser = commands.add_parser(
        "solve",
        help="cut a cost graph given as JSON",
        description="Cut a cost graph into stages so that the busiest device has the least to do.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("graph", metavar="GRAPH.json", type=Path, help="a cost graph as node-link JSON")
    parser.add_argument("--json", action="store_true", help="print the cut as JSON instead of a table")
    parser.add_argument(
        "--max-chunks", type=count, default=1, metavar="Q", help="stages that a device may hold (default: 1)"
    )
    parser.add_argument(
        "--time-limit-s", type=positive, default=20.0, metavar="T", help="when to stop, in seconds (default: 20)"
    )


def solve_text(options: argparse.Namespace) -> str:
    """Solve the graph of the parsed arguments; return what is to be printed.

    Raises:
        StagecutError: the file is not a cost graph; in one line, with its path.
        InfeasibleError: no cut fits.
        OSError: the file cannot be read.
    """
    graph = read_graph(options.graph)
    from ..partitioner.cut import solve  # what imports scipy is imported once there is a graph to solve

    try:
        cut = solve(graph, max_chunks=options.max_chunks, time_limit_s=options.time_limit_s)
    except ConstraintError as error:
        raise StagecutError(f"{options.graph}: {error.message}") from error
    if options.json:
        return json.dumps(_record(cut), indent=1) + "\n"
    return _table(graph, cut)


def read_graph(path: Path) -> nx.DiGraph:
    """Read a cost graph.

    Raises:
        StagecutError: the file is no JSON, or not of the form that :func:`networkx.node_link_data` writes.
        OSError: the file cannot be read.
    """
    data = read_json(path)
    fault = _fault(data)
    if fault:
        raise StagecutError(f"{path}: {fault}")
    import networkx as nx

    graph = nx.DiGraph(**data.get("graph", {}))
    for node in data["nodes"]:
        graph.add_node(node["id"], **{key: value for key, value in node.items() if key != "id"})
    graph.add_edges_from((edge["source"], edge["target"]) for edge in _edges(data))
    return graph


def _edges(data: dict[str, Any]) -> Any:
    return data["edges"] if "edges" in data else data.get("links")


def _fault(data: Any) -> str | None:
    """Say what keeps the data from being a cost graph, and where; None if nothing does."""
    if not isinstance(data, dict):
        return f"expected an object with nodes and edges, got {_show(data)}"
    if not isinstance(data.get("nodes"), list):
        return 'there is no list "nodes"'
    if not isinstance(_edges(data), list):
        return 'there is no list "edges" or "links"'
    if not isinstance(data.get("graph"), dict):
        return 'there is no object "graph" with the devices'
    parts = (_node_faults(data["nodes"]), _edge_faults(data), _graph_faults(data["graph"]))
    return next((fault for faults in parts for fault in faults), None)


def _node_faults(nodes: list[Any]) -> Iterable[str]:
    seen = set()
    for place, node in enumerate(nodes):
        name = node.get("id") if isinstance(node, dict) else None
        if not isinstance(name, str | int | float):
            yield f"nodes[{place}] needs an id, a string or a number, but it is {_show(node)}"
            continue
        if name in seen:
            yield f"nodes[{place}] has the id {name!r}, as an earlier node has"
        seen.add(name)
        times = node.get("compute_s")
        if not isinstance(times, dict) or not all(_is_number(value) for value in times.values()):
            yield f"nodes[{place}] ({name!r}) needs compute_s, seconds per device kind, but it is {_show(times)}"
        for key in ("memory_bytes", "stash_bytes"):
            if not _is_number(node.get(key, 0.0)):
                yield f"nodes[{place}] ({name!r}): {key} must be a number, but it is {_show(node[key])}"
        if not _is_list_of(node.get("kinds", []), str):
            yield f"nodes[{place}] ({name!r}): kinds must be a list of names, but it is {_show(node['kinds'])}"


def _edge_faults(data: dict[str, Any]) -> Iterable[str]:
    names = {node["id"] for node in data["nodes"] if isinstance(node, dict) and isinstance(node.get("id"), str | int)}
    for place, edge in enumerate(_edges(data)):
        for end in ("source", "target"):
            name = edge.get(end) if isinstance(edge, dict) else None
            if not isinstance(name, str | int | float):
                yield f"edges[{place}] needs a {end}, but it is {_show(edge)}"
            elif name not in names:
                yield f"edges[{place}]: the {end} {name!r} is no node"


def _graph_faults(graph: dict[str, Any]) -> Iterable[str]:
    if not isinstance(graph.get("devices"), list) or not graph["devices"]:
        yield f"graph.devices must be a list of devices, but it is {_show(graph.get('devices'))}"
        return
    fields = {"name", "kind", "memory_bytes", "pays_transfers"}
    for place, device in enumerate(graph["devices"]):
        at = f"graph.devices[{place}]"
        if not isinstance(device, dict) or not _is_list_of([device.get("name"), device.get("kind")], str):
            yield f"{at} needs a name and a kind, but it is {_show(device)}"
            continue
        if set(device) - fields:
            yield f"{at} has unknown fields {sorted(set(device) - fields)}; there are {sorted(fields)}"
        limit = device.get("memory_bytes")
        if limit is not None and not (_is_number(limit) and limit >= 0):
            yield f"{at}: memory_bytes must be a number of at least 0 or null, but it is {_show(limit)}"
    for key in ("transfers", "together"):
        if not isinstance(graph.get(key, []), list):
            yield f"graph.{key} must be a list, but it is {_show(graph[key])}"
            return
    for place, net in enumerate(graph.get("transfers", [])):
        if not isinstance(net, dict) or not _names(net.get("nodes")) or not _is_number(net.get("seconds")):
            yield f"graph.transfers[{place}] needs nodes and seconds, but it is {_show(net)}"
    for place, group in enumerate(graph.get("together", [])):
        if not _names(group):
            yield f"graph.together[{place}] must be a list of nodes, but it is {_show(group)}"


def _names(value: Any) -> bool:
    return bool(value) and isinstance(value, list) and all(isinstance(name, str | int | float) for name in value)


def _is_number(value: Any) -> bool:
    return finite(value) is not None


def _is_list_of(value: Any, sort: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, sort) for entry in value)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _record(cut: Cut) -> dict[str, Any]:
    return {
        "device_of": {str(node): name for node, name in cut.device_of.items()},
        "stage_of": {str(node): stage for node, stage in cut.stage_of.items()},
        "order": list(cut.order),
        "load_of": cut.load_of,
        "max_load": cut.max_load,
        "lower_bound": cut.lower_bound,
        "optimal": cut.optimal,
        "seconds": cut.seconds,
    }


def _table(graph: nx.DiGraph, cut: Cut) -> str:
    """One line per stage, then the largest load beside its bound."""
    counts = [0] * len(cut.order)
    for stage in cut.stage_of.values():
        counts[stage] += 1
    rows = [("stage", "device", "nodes", "load s", "device load s", "bytes")]
    rows += [
        (
            str(s),
            name,
            str(counts[s]),
            f"{cut.loads_s[s]:.6g}",
            f"{cut.load_of[name]:.6g}",
            f"{cut.memory_bytes[s]:,.0f}",
        )
        for s, name in enumerate(cut.order)
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    gap = 1 - cut.lower_bound / cut.max_load if cut.max_load else 0.0
    proof = "optimal, proven" if cut.optimal else f"at least {cut.lower_bound:.6g} s proven, gap {gap:.1%}"
    lines += [
        "",
        f"{len(graph)} nodes; largest device load {cut.max_load:.6g} s ({proof}); {cut.seconds:.2f} s of search",
    ]
    return "\n".join(lines) + "\n"
