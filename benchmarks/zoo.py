"""Capture a zoo of models, and compare each capture with the eager model: results, gradients, buffers, modes, balance.

    python benchmarks/zoo.py --json zoo.json                      # every entry, by stagecut.capture
    python benchmarks/zoo.py --json zoo.json --update --peers     # the same entries by other tracers
    python benchmarks/zoo.py --json zoo.json --report --markdown docs/coverage.md
    python benchmarks/zoo.py --group hf --only 'bert*' --methods eager,stagecut

Needs torchvision, timm and transformers (``pip install 'stagecut[zoo]'``); a group without its library is left out.
Nothing is downloaded: weights are random, configurations are small. Every entry runs in a process of its own, with a
time limit.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import random
import signal
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from zoo_checks.examine import METHODS, PEERS
from zoo_checks.pool import run_all
from zoo_checks.tables import markdown, one_line, summary
from zoo_entries import GROUPS, Entry, load_group


def main() -> None:
    """Run the zoo as the command line asks."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes below are ended too
    report: dict[str, Any] = {"about": about(), "missing": {}, "entries": {}}
    if options.json and options.json.exists() and (options.update or options.resume or options.report):
        report["entries"] = json.loads(options.json.read_text())["entries"]
    if not options.report:
        run(options, report)
    print(summary(report))
    if options.markdown:
        options.markdown.write_text(markdown(report))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="only this group; may be repeated")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="only names that match; may be repeated")
    parser.add_argument("--sample", type=int, metavar="N", help="only N entries of each group, drawn with a fixed seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--limit", type=float, default=240, metavar="SECONDS", help="processor time for an entry by one method"
    )
    parser.add_argument("--methods", default="stagecut", help=f"comma-separated, of {', '.join(METHODS)}")
    parser.add_argument("--peers", action="store_true", help=f"also {', '.join(PEERS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every record, as the run goes on")
    parser.add_argument("--update", action="store_true", help="keep what FILE knows of other entries and methods")
    parser.add_argument("--resume", action="store_true", help="run only what FILE has no record of")
    parser.add_argument("--report", action="store_true", help="run nothing, only report on FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report as a document")
    parser.add_argument("--list", action="store_true", help="list the entries and stop")
    options = parser.parse_args()
    unknown = set(options.methods.split(",")) - set(METHODS)
    if unknown:
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}")
    return options


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Examine the chosen entries and fill ``report``."""
    methods = [*options.methods.split(","), *(PEERS if options.peers else ())]
    tasks: list[tuple[Entry, str]] = []
    for group in options.group or GROUPS:
        table = load_group(group)
        report["missing"].update({f"{group}/{name}": why for name, why in table.missing.items()})
        chosen = [entry for name, entry in table.entries.items() if matches(name, options.only)]
        if options.sample is not None and options.sample < len(chosen):
            chosen = random.Random(0).sample(chosen, options.sample)
        tasks += [(entry, method) for entry in chosen for method in methods]
    if options.resume:
        known = report["entries"]
        tasks = [task for task in tasks if task[1] not in known.get(task[0].label, {"methods": {}})["methods"]]
    if options.list:
        print("\n".join(dict.fromkeys(entry.label for entry, _ in tasks)))
        raise SystemExit
    start, n_done = time.monotonic(), 0

    def done(entry: Entry, method: str, record: dict[str, Any]) -> None:
        nonlocal n_done
        n_done += 1
        known = report["entries"].setdefault(entry.label, {"group": entry.group, "name": entry.name, "methods": {}})
        known["note"] = entry.note
        known["methods"][method] = record
        print(f"[{n_done}/{len(tasks)}] {entry.label} {method}: {one_line(record)}", file=sys.stderr, flush=True)
        save(options.json, report)

    with tempfile.TemporaryDirectory() as folder:
        run_all(tasks, workers=options.workers, limit_s=options.limit, folder=Path(folder), done=done)
    report["about"]["minutes"] = round((time.monotonic() - start) / 60, 1)
    save(options.json, report)


def matches(name: str, patterns: list[str] | None) -> bool:
    """Say whether a name matches one of the patterns, as in a shell; without patterns all do."""
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def save(path: Path | None, report: dict[str, Any]) -> None:
    """Write the report, whole or not at all."""
    if path is not None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(report, indent=1))
        part.replace(path)


def about() -> dict[str, Any]:
    """Say what the numbers were measured with."""
    versions = {}
    for package in ("torch", "torchvision", "timm", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "versions": versions}


if __name__ == "__main__":
    main()
