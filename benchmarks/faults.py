"""Inject every fault of the list, and print what is seen, how soon, what is left, and whether numbers agree.

    python benchmarks/faults.py
    python benchmarks/faults.py --only SIGSTOP

Rows that mount file systems or make namespaces need root, and are left out without it.
"""

from __future__ import annotations

import argparse
import os

import torch
from fault_rows import checkpoints, processes, steps
from fault_rows.outcome import Outcome, Row, carried_out

ROWS: list[Row] = [*steps.ROWS, *processes.ROWS, *checkpoints.ROWS]


def line(fault: str, found: Outcome) -> str:
    """Format a row of the table."""
    seconds = "" if found.seconds is None else f"{found.seconds:.2f}"
    goal = "" if found.goal_s is None else f"{found.goal_s:g}"
    agree = {True: "yes", False: "NO", None: ""}[found.equal]
    left = "; ".join(found.left) or "0"
    return f"| {fault} | {found.fired} | {found.seen} | {seconds} | {goal} | {left} | {agree} |"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| fault | fired | seen | seconds | goal | left | numbers equal |\n|---|---|---|---|---|---|---|")
    bad = 0
    for row in ROWS:
        if options.only not in row.fault or (row.needs_root and os.geteuid() != 0):
            continue
        found = carried_out(row)
        bad += not found.ok
        print(line(row.fault, found), flush=True)
    raise SystemExit(f"{bad} rows are not as promised" if bad else 0)


if __name__ == "__main__":
    main()
