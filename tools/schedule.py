"""The subcommand ``partition-viz schedule``: a published or searched schedule for given costs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConstraintError, InfeasibleError, StagecutError
from ..runtime.schedules.families import FAMILIES
from .arguments import count, not_negative, positive
from .json_file import read_json

if TYPE_CHECKING:
    from ..partitioner.scheduling import PipelineCosts, Scored

_EXAMPLES = """examples:
  partition-viz schedule --costs costs.json --name 1f1b --microbatches 24
  partition-viz schedule --costs costs.json --name search --microbatches 24 --json > schedule.json
  partition-viz schedule --costs costs.json --from schedule.json --trace trace.json
  partition-viz schedule --costs costs.json --name search --microbatches 8 --certify-s 20
  partition-viz schedule --costs costs.json --name zb-v --microbatches 16 --csv order.csv

costs.json
  per stage    "forward_s", "backward_input_s", "backward_weight_s", "activation_bytes" (held from the forward on),
               "weight_grad_bytes" (the part of them that the weight gradient needs; the rest goes after the input
               gradient)
  may have     "memory_bytes" [one per worker, or null], "link_s" (one number, or one per boundary), "op_overhead_s",
               "split_backward" (true: input and weight gradients may be computed apart)

the order of a worker is a list of computations, stage first: 0F3 is the forward of microbatch 3 on stage 0, B a whole
backward, I an input gradient, W a weight gradient

exit codes: 0 done, 2 wrong arguments or a bad file, 4 it does not fit in memory
"""


def add_schedule(commands: Any) -> None:
    """Add the subcommand's parser."""
    parser = commands.add_parser(
        "schedule",
        help="order the computations of a pipeline",
        description="Order forwards and backwards of a pipeline: a published schedule, or the best that is found.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--costs", metavar="COSTS.json", type=Path, required=True, help="seconds and bytes per stage")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--name", choices=[*FAMILIES, "search"], metavar="NAME", help=", ".join([*FAMILIES, "search"]))
    what.add_argument("--from", dest="source", type=Path, metavar="FILE", help="an order from a .json or .csv file")
    parser.add_argument("--microbatches", type=count, metavar="M", help="pieces of the batch (with --name)")
    parser.add_argument("--workers", type=count, metavar="P", help="workers, where memory_bytes does not tell")
    parser.add_argument("--time-s", type=not_negative, metavar="T", help="how long to search, about (default: 5)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the search (default: 0)")
    parser.add_argument(
        "--certify-s", type=positive, metavar="T", help="then let OR-tools prove or better it for T seconds"
    )
    parser.add_argument("--json", action="store_true", help="print the schedule as JSON instead of a picture")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write the order for torch.distributed.pipelining"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also write the times for chrome://tracing")


def schedule_text(options: argparse.Namespace) -> str:
    """Make the schedule of the parsed arguments; return what is to be printed.

    Raises:
        StagecutError: a file or an argument is wrong; in one line, with its path.
        InfeasibleError: a worker holds more than its memory.
        OSError: a file cannot be read or written.
    """
    from ..partitioner.scheduling.files import chrome_trace, costs_from_json, to_csv, to_json

    _check_options(options)
    costs = _at(options.costs, costs_from_json, read_json(options.costs))
    start = time.perf_counter()
    scored = _read(options, costs) if options.source else _make(options, costs)
    if options.certify_s:
        from ..partitioner.scheduling.certificate import certified

        scored = certified(scored, options.certify_s)
    seconds = time.perf_counter() - start
    if options.csv:
        options.csv.write_text(to_csv(scored.orders), encoding="utf-8")
    if options.trace:
        options.trace.write_text(json.dumps(chrome_trace(scored)), encoding="utf-8")
    if options.json:
        return json.dumps(to_json(scored, seconds)) + "\n"
    everywhere = options.name == "search" and not options.certify_s
    return _picture(scored, seconds, everywhere)


def _check_options(options: argparse.Namespace) -> None:
    if options.source is None and options.microbatches is None:
        raise StagecutError(f"how many microbatches has {options.name}?", hint="--microbatches 8")
    if options.source is not None and (options.microbatches or options.workers):
        raise StagecutError("--microbatches and --workers are in the file that --from names; leave them out")
    if options.name != "search" and (options.time_s is not None or options.seed is not None):
        raise StagecutError("--time-s and --seed belong to --name search")


def _make(options: argparse.Namespace, costs: PipelineCosts) -> Scored:
    from ..partitioner.scheduling import family_schedule, search

    if options.name != "search":
        return family_schedule(options.name, costs, options.microbatches, options.workers)
    time_s = 5.0 if options.time_s is None else options.time_s
    if not sys.stderr.isatty():
        return search(costs, options.microbatches, options.workers, time_s=time_s, seed=options.seed or 0)
    found = search(costs, options.microbatches, options.workers, time_s=time_s, seed=options.seed or 0, progress=_tell)
    _tell("")
    return found


def _tell(what: str) -> None:
    print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def _read(options: argparse.Namespace, costs: PipelineCosts) -> Scored:
    from ..partitioner.scheduling.files import orders_from_csv, orders_from_json, scored_orders

    path: Path = options.source
    if path.suffix == ".csv":
        orders = _at(path, orders_from_csv, path.read_text(encoding="utf-8"))
    else:
        orders = _at(path, orders_from_json, read_json(path))
    return scored_orders(str(path), costs, orders)


def _at(path: Path, function: Any, value: Any) -> Any:
    """Call a function on what a file says; its complaints are about the file."""
    try:
        return function(value)
    except InfeasibleError:
        raise
    except ConstraintError as error:
        raise StagecutError(f"{path}: {error.message}", hint=error.hint) from error


_WIDTH = 96


def _picture(scored: Scored, seconds: float, everywhere: bool) -> str:
    """Draw who computes what and when, a table of the workers, and how good that is.

    ``everywhere`` says that the bound is not of the schedule's own placement alone.
    """
    from ..partitioner.scheduling import idle_by_cause

    lines = [f"worker {w:>3} |{_row(scored, w)}|" for w in range(len(scored.orders))]
    lines += ["           F forward, B backward, I input gradient, W weight gradient, . idle", ""]
    rows = _rows(scored)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    above = scored.makespan_s / scored.lower_bound_s - 1 if scored.lower_bound_s else 0.0
    proof = (
        "optimal, proven" if above <= 1e-9 else f"{above:.1%} above the proven bound of {scored.lower_bound_s:.6g} s"
    )
    if not everywhere and scored.problem.layout.n_stages > len(scored.orders):
        proof += ", on this placement"
    causes = [f"{cause} {share:.1%}" for cause, share in idle_by_cause(scored).items() if share >= 5e-4]
    lines += [
        "",
        f"{scored.name}, {scored.problem.n_microbatches} microbatches: makespan {scored.makespan_s:.6g} s ({proof}), "
        f"bubble {scored.bubble:.1%}, of the longest span {scored.span_bubble:.1%}; {seconds:.2f} s",
        *([f"idle: {', '.join(causes)}"] if causes else []),
    ]
    return "\n".join(lines) + "\n"


def _row(scored: Scored, worker: int) -> str:
    cells = ["."] * _WIDTH
    scale = _WIDTH / scored.makespan_s if scored.makespan_s else 0.0
    for action, start, end in zip(scored.orders[worker], scored.starts_s(worker), scored.ends_s[worker]):
        for place in range(round(start * scale), round(end * scale)):
            cells[min(place, _WIDTH - 1)] = action.kind
    return "".join(cells)


def _rows(scored: Scored) -> list[tuple[str, ...]]:
    """Return one line of words per worker, the first being the head of the table."""
    rows: list[tuple[str, ...]] = [("worker", "stages", "busy s", "idle", "peak bytes", "in flight")]
    for w in range(len(scored.orders)):
        stages = ",".join(map(str, scored.problem.stages_of(w)))
        idle = 1 - scored.busy_s(w) / scored.makespan_s if scored.makespan_s else 0.0
        rows.append(
            (
                str(w),
                stages,
                f"{scored.busy_s(w):.6g}",
                f"{max(0.0, idle):.1%}",
                f"{scored.peak_bytes[w]:,.0f}",
                str(scored.peak_in_flight[w]),
            )
        )
    return rows
