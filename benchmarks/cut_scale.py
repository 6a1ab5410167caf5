"""How long the exact cut takes on large graphs, and how close it gets: `python benchmarks/cut_scale.py`.

Every case is solved in a process of its own, on one thread.  Seconds are those of ``solve`` on a networkx graph, from
reading it to the named stages; memory is the highest resident size of the process, with graph and libraries in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from synthetic_dags import SHAPES, of_size

from stagecut.partitioner.cut import CutDevice, solve

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def measure(shape: str, n_nodes: int, k: int, ordered: bool, time_limit_s: float) -> dict[str, object]:
    """Solve one case in this process."""
    graph = of_size(shape, n_nodes)
    devices = [CutDevice(f"gpu:{i}", "gpu") for i in range(k)]
    cut = solve(graph, devices, ordered=ordered, time_limit_s=time_limit_s)
    return {
        "graph": shape,
        "nodes": len(graph),
        "k": k,
        "order": "given" if ordered else "free",
        "seconds": round(cut.seconds, 2),
        "gap": f"{1 - cut.lower_bound / cut.max_load:.3%}",
        "optimal": cut.optimal,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Print a table of the chosen cases, or solve one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["transformer"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1_000, 10_000, 100_000])
    parser.add_argument("--devices", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--orders", nargs="+", choices=["free", "given"], default=["free", "given"])
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for each case")
    parser.add_argument("--here", action="store_true", help="solve the first case in this process and print JSON")
    given = parser.parse_args()
    cases = [(s, n, k, o) for s in given.shapes for n in given.nodes for k in given.devices for o in given.orders]
    if given.here:
        shape, n_nodes, k, order = cases[0]
        print(json.dumps(measure(shape, n_nodes, k, order == "given", given.time_limit)))
        return
    for i, case in enumerate(cases):
        flags = ("--shapes", "--nodes", "--devices", "--orders")
        named = [text for flag, value in zip(flags, case, strict=True) for text in (flag, str(value))]
        command = [sys.executable, __file__, "--here", *named, "--time-limit", str(given.time_limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **_ONE_THREAD})
        row = json.loads(done.stdout)
        if i == 0:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)


if __name__ == "__main__":
    main()
