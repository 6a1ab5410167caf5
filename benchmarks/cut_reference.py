"""The cut on cost graphs beside the best known values: `python benchmarks/cut_reference.py FOLDER`.

FOLDER has node-link JSON files of cost graphs.  Per graph and number of chunks per device: the largest load found, the
best known value where there is one, the proven lower bound, the gap between load and bound, and the wall-clock seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import networkx as nx

from stagecut.partitioner.cut import solve

# Contiguous optima (proven), then the best known for 2 and 3 chunks per device; seconds, rounded to 4 decimals.
BEST_KNOWN = {
    "layer_bert24_training": (41.7458, 39.8447, 39.7895),
    "layer_bert24_training_fixed": (46.6082, 46.6082, 46.6082),
    "layer_gnmt_inference": (32.9107, 31.8467, 31.7067),
    "layer_gnmt_inference_fixed": (44.7822, 44.7822, 44.7822),
    "layer_resnet50_training": (78.6318, 76.5519, 76.4398),
    "layer_resnet50_training_fixed": (479.0379, 479.0379, 479.0379),
    "operator_bert_l-3_inference": (27.9186, 21.9084, 21.9084),
    "operator_bert_l-6_training": (72.8650, 72.0356, 71.6423),
}
_HEADER = ("graph", "q", "load", "best known", "bound", "gap %", "seconds", "optimal")


def row(path: Path, max_chunks: int, time_limit_s: float) -> tuple[str, ...]:
    """Solve one graph once."""
    data = json.loads(path.read_text(encoding="utf-8"))
    graph = nx.node_link_graph(data, edges="edges" if "edges" in data else "links")
    begin = time.perf_counter()
    cut = solve(graph, max_chunks=max_chunks, time_limit_s=time_limit_s)
    seconds = time.perf_counter() - begin
    known = BEST_KNOWN.get(path.stem, ())
    return (
        path.stem,
        str(max_chunks),
        f"{cut.max_load:.4f}",
        f"{known[max_chunks - 1]:.4f}" if max_chunks <= len(known) else "",
        f"{cut.lower_bound:.4f}",
        f"{100 * (cut.max_load / cut.lower_bound - 1):.2f}" if cut.lower_bound else "",
        f"{seconds:.1f}",
        "yes" if cut.optimal else "no",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 3], metavar="Q")
    parser.add_argument("--time-limit-s", type=float, default=20.0)
    options = parser.parse_args()
    print("| " + " | ".join(_HEADER) + " |")
    print("|---" * len(_HEADER) + "|")
    for path in sorted(options.folder.glob("*.json")):
        for max_chunks in options.chunks:
            print("| " + " | ".join(row(path, max_chunks, options.time_limit_s)) + " |", flush=True)


if __name__ == "__main__":
    main()
