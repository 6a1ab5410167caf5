"""Fuzz the readers of files, guided by coverage: any bytes give a valid object or a StagecutError.

    pip install "stagecut[fuzz]"
    python benchmarks/fuzz.py plan --seconds 60           # plans, runs, orders, costs, clusters, cost graphs, caches
    python benchmarks/fuzz.py checkpoint --seconds 60     # manifests, values, process records, safetensors
    python benchmarks/fuzz.py plan --input crash-1234     # one input again, with its traceback

atheris (libFuzzer) draws bytes; `fuzz_plans.py` and `fuzz_checkpoints.py` take decisions from them: which valid file,
which mistakes, checksums that fit or not. A run fails on any other exception, on anything executed or written while
reading, after 20 seconds, or at 4 GiB. The corpus begins with files of real objects; `--corpus FOLDER` keeps it.
Exit code 1 says that something was found; the input that it was found with is in the current folder.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz_documents import FOLDER, temporary_folder

TARGETS = {"plan": "fuzz_plans", "checkpoint": "fuzz_checkpoints"}
_PROGRESS = re.compile(r"#(\d+)\s+(\w+)\s+cov: (\d+) ft: (\d+) corp: (\d+)")
_LIMITS = ("-timeout=20", "-rss_limit_mb=4096", "-max_len=256", "-print_final_stats=1")


def inside(target: str, corpus: Path, seconds: int, seed: int) -> None:
    """Run libFuzzer in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=["stagecut"]):
        module = importlib.import_module(TARGETS[target])
    for name, data in module.seeds().items():
        (corpus / name).write_bytes(data)
        module.run(data)  # what is made once is made before anything is measured
    limits = [*_LIMITS, f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={Path.cwd()}/"]
    atheris.Setup([sys.argv[0], str(corpus), *limits], lambda data: module.run(data) and None)
    atheris.Fuzz()


def fuzzed(target: str, seconds: int, seed: int, corpus: Path) -> int:
    """Fuzz in a process of its own and print what came of it; return the exit code."""
    command = [sys.executable, __file__, target, "--seconds", str(seconds), "--seed", str(seed)]
    with temporary_folder() as scratch:
        environment = {**os.environ, FOLDER: scratch}
        done = subprocess.run(
            [*command, "--inside", str(corpus)], capture_output=True, text=True, check=False, env=environment
        )
    printed = done.stdout + done.stderr
    progress = [tuple(map(int, m.group(1, 3, 5))) for m in _PROGRESS.finditer(printed)]
    if not progress:
        print(f"{target}: nothing was run\n{printed[-4000:]}")
        return 1
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", printed)
    n_runs = int(runs[1]) if runs else progress[-1][0]
    first, last = progress[0], progress[-1]
    found = "nothing found" if done.returncode == 0 else "FOUND:"
    print(f"{target}: {n_runs:,} runs, coverage {first[1]:,} -> {last[1]:,} edges, {last[2]:,} inputs kept; {found}")
    if done.returncode:
        lines = [line for line in printed.splitlines() if not line.startswith(("#", "INFO", "WARNING"))]
        print("\n".join(lines)[-6000:])
    return 1 if done.returncode else 0


def main() -> int:
    """Fuzz one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="where inputs that reach new code are kept")
    parser.add_argument("--input", type=Path, help="run one input")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.input is not None:
        accepted = importlib.import_module(TARGETS[options.target]).run(options.input.read_bytes())
        print("accepted" if accepted else "refused")
        return 0
    if options.inside is not None:
        inside(options.target, options.inside, options.seconds, options.seed)
    if options.corpus is not None:
        options.corpus.mkdir(parents=True, exist_ok=True)
        return fuzzed(options.target, options.seconds, options.seed, options.corpus)
    with tempfile.TemporaryDirectory() as name:
        return fuzzed(options.target, options.seconds, options.seed, Path(name))


if __name__ == "__main__":
    sys.exit(main())
