"""The schedule search on a grid of pipelines, beside every published schedule and the proven bound.

    python benchmarks/schedule_search.py                 # all cases, several minutes
    python benchmarks/schedule_search.py --workers 4 --microbatches 8

Stages take 1, 1 and 0.7 (forward, input and weight gradient) and are uniform, random by up to 30 %, uniform with one
that takes 1.5 times as long, or with a last stage of twice the length. Latency is 0.02 or 0.3 of a forward. Memory is
the same for all workers: 0.75, 1 or 1.5 times what 1F1B needs on its fullest one. Backwards are split, or in one. Each
pipeline is given once with one stage per worker, and once with two halves of it, which lets loops and Vs take part.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path

from stagecut.errors import PlanError
from stagecut.partitioner.scheduling import PipelineCosts, family_schedule, search
from stagecut.partitioner.scheduling.certificate import certified
from stagecut.runtime.schedules.families import FAMILIES

PROFILES = ("uniform", "random", "straggler", "heavy last")
LATENCIES = {"low": 0.02, "high": 0.3}
CAPS = (0.75, 1.0, 1.5)
FAR = 1.05
SMALL = 32


@dataclass(frozen=True)
class Case:
    n_workers: int
    n_microbatches: int
    profile: str
    latency: str
    cap: float
    split: bool
    chunks: int

    def costs(self) -> PipelineCosts:
        p = self.n_workers
        chance = random.Random(f"{p} {self.profile}")
        scale = [1.0] * p
        if self.profile == "random":
            scale = [1 + 0.3 * (2 * chance.random() - 1) for _ in range(p)]
        elif self.profile == "straggler":
            scale[chance.randrange(p)] = 1.5
        elif self.profile == "heavy last":
            scale[-1] = 2.0
        whole = PipelineCosts(
            forward_s=tuple(scale),
            backward_input_s=tuple(scale),
            backward_weight_s=tuple(0.7 * x for x in scale),
            activation_bytes=(1.0,) * p,
            weight_grad_bytes=(0.5,) * p,
            link_s=(LATENCIES[self.latency],) * (p - 1),
            split_backward=self.split,
        )
        limit = self.cap * max(family_schedule("1f1b", whole, self.n_microbatches).peak_bytes)
        return replace(halved(whole) if self.chunks == 2 else whole, memory_bytes=(limit,) * p)


def halved(costs: PipelineCosts) -> PipelineCosts:
    """Cut every stage into two equal halves."""

    def halves(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value / 2 for value in values for _ in range(2))

    return replace(
        costs,
        forward_s=halves(costs.forward_s),
        backward_input_s=halves(costs.backward_input_s),
        backward_weight_s=halves(costs.backward_weight_s),
        activation_bytes=halves(costs.activation_bytes),
        weight_grad_bytes=halves(costs.weight_grad_bytes),
        link_s=(costs.link_s[0],) * (2 * len(costs.link_s) + 1),
    )


@dataclass(frozen=True)
class Result:
    case: Case
    makespan_s: float
    bound_s: float
    family: str | None
    family_s: float | None
    seconds: float

    @property
    def gap(self) -> float:
        return self.makespan_s / self.bound_s - 1

    @property
    def gain(self) -> float | None:
        return None if self.family_s is None else self.family_s / self.makespan_s - 1


def solve(given: tuple[Case, float, float]) -> Result:
    case, time_s, certify_s = given
    costs = case.costs()
    fitting = []
    for name, family in FAMILIES.items():
        try:
            if family.trains:
                made = family_schedule(name, costs, case.n_microbatches, case.n_workers)
                fitting.append((made.makespan_s, name))
        except PlanError:
            continue
    best_s, best = min(fitting, default=(None, None))
    start = time.perf_counter()
    found = search(costs, case.n_microbatches, time_s=time_s)
    seconds = time.perf_counter() - start
    small = case.chunks == 1 and case.n_workers * case.n_microbatches <= SMALL
    if certify_s and small and found.makespan_s > FAR * found.lower_bound_s:
        found = certified(found, certify_s)
    assert best_s is None or found.makespan_s <= best_s * (1 + 1e-9), (case, best, best_s, found.makespan_s)
    return Result(case, found.makespan_s, found.lower_bound_s, best, best_s, seconds)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for p in options.workers or (4, 8, 16):
        for m in options.microbatches or (8, 16, 32):
            for chunks in (1, 2):
                for cap in CAPS:
                    for split in (True, False):
                        for profile in PROFILES:
                            for latency in LATENCIES:
                                yield Case(p, m, profile, latency, cap, split, chunks)


def table(results: list[Result]) -> str:
    lines = [
        "| workers | microbatches | stages per worker | memory | backward | gap to the bound, median (worst) | "
        "a published one fits | its makespan over ours, median (most) | seconds, median (most) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[object, ...], list[Result]] = {}
    for r in results:
        c = r.case
        groups.setdefault((c.n_workers, c.n_microbatches, c.chunks, c.cap, c.split), []).append(r)
    for (p, m, chunks, cap, split), own in groups.items():
        gaps = [r.gap for r in own]
        gains = [r.gain for r in own if r.gain is not None]
        ratio = f"{1 + statistics.median(gains):.3f} ({1 + max(gains):.3f})" if gains else "-"
        lines.append(
            f"| {p} | {m} | {chunks} | {cap} | {'split' if split else 'whole'} | {statistics.median(gaps):.1%} "
            f"({max(gaps):.1%}) | {len(gains)} of {len(own)} | {ratio} | "
            f"{statistics.median(r.seconds for r in own):.1f} ({max(r.seconds for r in own):.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, action="append")
    parser.add_argument("--microbatches", type=int, action="append")
    parser.add_argument("--time-s", type=float, default=5.0)
    parser.add_argument(
        "--certify-s", type=float, default=0.0, help="seconds of CP-SAT for small chains far above their bound"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    todo = [(case, options.time_s, options.certify_s) for case in cases(options)]
    results = []
    with Pool(options.processes) as pool:
        for done, result in enumerate(pool.imap(solve, todo), start=1):
            results.append(result)
            print(f"\r{done} of {len(todo)}", end="", flush=True)
    print()
    print(table(results))
    never_worse = sum(1 for r in results if r.gain is not None)
    beaten = sum(1 for r in results if r.gain is not None and r.gain > 1e-9)
    print(f"\n{len(results)} cases; a published schedule fits in {never_worse}, and {beaten} of them were beaten")
    if options.json:
        rows = [{**r.case.__dict__, "makespan_s": r.makespan_s, "bound_s": r.bound_s, "family": r.family,
                 "family_s": r.family_s, "seconds": r.seconds} for r in results]  # fmt: skip
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
