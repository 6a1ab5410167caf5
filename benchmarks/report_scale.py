"""How long `partition-viz report` takes for plans of many ops, and how large its page is.

    python benchmarks/report_scale.py

The plans are deep stacks of like layers, 25 ops each, in eight stages, and the same number of ops without any module.
Each is written by a process of its own, from the command's start to its end. With Playwright and Chromium there, the
page is opened from disk too: seconds until all views are drawn, and until a chosen stage is marked in them.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stagecut.partitioner.plan import (
    FORMAT,
    LinkRecord,
    OpRecord,
    Plan,
    Prediction,
    StageRecord,
    Timing,
    WireRecord,
    load,
)

N_STAGES, N_MICROBATCHES, LAYER = 8, 16, 25
GIB = 1 << 30


def synthetic(n_ops: int, modules: bool) -> Plan:
    """Make a plan: a chain of layers, each of which adds what it began with to its result."""
    ops: list[OpRecord] = []
    for index in range(n_ops):
        layer, place = divmod(index, LAYER)
        inputs = [ops[-1].name if ops else "x"]
        if place == LAYER - 1:
            inputs.append(ops[-LAYER + 1].name)
        path = f"model.layers.{layer}.{'attention' if place < 12 else 'mlp'}.{place % 4}" if modules else ""
        stage = index * N_STAGES // n_ops
        ops.append(
            OpRecord(
                f"op_{index}", "aten.linear", path, f"model.py:{place}", stage, tuple(inputs), 1e-4, 2e-4, 1 << 20,
                1 << 20, "analytic",
            )
        )  # fmt: skip
    of_stage = [[op for op in ops if op.stage == s] for s in range(N_STAGES)]
    stages = tuple(
        StageRecord(
            s, (f"A100:{s}",), (s,), sum(op.forward_s for op in own), sum(op.backward_s for op in own), GIB,
            len(own) << 20, N_STAGES - s, 4 * GIB + (N_STAGES - s) * (len(own) << 20), 640.0 * GIB,
        )
        for s, own in enumerate(of_stage)
    )  # fmt: skip
    used = {(name, op.stage) for op in ops for name in op.inputs if name != "x"}
    stage_of = {op.name: op.stage for op in ops}
    crossing = sorted((stage_of[name], name, to) for name, to in used if stage_of[name] != to)
    wires = tuple(WireRecord(name, source, (to,), 1 << 20, True) for source, name, to in crossing)
    links = tuple(LinkRecord(s, s + 1, 1e-5, 2e11) for s in range(N_STAGES - 1))
    prediction = Prediction(1.0, 0.3, 1.0, 1.0, True, 6.0, "analytic")
    return Plan(
        FORMAT, "Synthetic", "0" * 16, N_MICROBATCHES * 4, N_MICROBATCHES, "1f1b", ("x",), tuple(ops), stages, wires,
        prediction, (), timing=Timing(links=links),
    )  # fmt: skip


def written(plan: Path, page: Path) -> float:
    """Return the seconds that the command takes."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "stagecut.tools.partition_viz", "report", str(plan), "-o", str(page)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def drawn(browser: Any, page: Path) -> tuple[float, float]:
    """Return the seconds until the page is drawn, and from a key to the mark of a stage."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    start = time.perf_counter()
    tab.goto(page.as_uri())
    tab.wait_for_selector("#report header")
    shown = time.perf_counter() - start
    start = time.perf_counter()
    tab.keyboard.press("n")
    tab.wait_for_selector("#graph g.lane.chosen")
    marked = time.perf_counter() - start
    tab.close()
    return shown, marked


def main() -> None:
    """Print a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=int, action="append", help="1000, 10000 and 50000 if none are given")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        chromium = None
    print("| ops | modules | report | page | drawn | a stage marked |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for n_ops in options.ops or (1_000, 10_000, 50_000):
            for modules in (True, False):
                plan, page = Path(folder) / "plan.json", Path(folder) / "plan.html"
                synthetic(n_ops, modules).save(plan)
                load(plan)  # it is a plan that anybody could be given
                seconds = [written(plan, page) for _ in range(options.rounds)]
                looks = "- | -"
                if chromium is not None:
                    with sync_playwright() as driver:
                        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                        found = [drawn(browser, page) for _ in range(options.rounds)]
                        browser.close()
                    looks = " | ".join(f"{statistics.median(each):.2f} s" for each in zip(*found))
                print(
                    f"| {n_ops:,} | {'in layers' if modules else 'none'} | {statistics.median(seconds):.1f} s "
                    f"({min(seconds):.1f} to {max(seconds):.1f}) | {page.stat().st_size / 1024:.0f} KiB | {looks} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
