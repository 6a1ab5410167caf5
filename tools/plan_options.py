"""What the subcommands of ``partition-viz`` that take plans can be told; imports next to nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.schedules import TRAINING_SCHEDULES
from .arguments import count, list_of, positive, yes_or_no
from .examples import CHECK, COMPARE, EXPORT, PROFILE, REPORT, SCHEMA, SHOW, SWEEP

WORKERS = "2"
GIB = 1 << 30
_DESCRIBED = "devices that need not exist: sim:4xA100-80GB, cluster.toml"
_HERE = "devices that are here, as --devices has them: those that are only described cannot run"
# Options that make a plan, with what they are when nobody gave them; a plan file has its answers already.
PLANNING = ("devices", "cluster", "stages", "replicas", "microbatches", "schedule", "batch", "costs", "memory_gib")

_MODELS = "demo:resnet, torchvision:NAME, timm:NAME, hf:TYPE, file.py:FUNCTION"


def add_plan_commands(commands: Any) -> None:
    """Add the subcommands' parsers."""
    show = _command(commands, "show", "print the plan as tables", SHOW)
    show.add_argument("--json", action="store_true", help="print the plan as JSON instead")
    report = _command(commands, "report", "write the plan as a page to be explored", REPORT)
    report.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="plan.html; or what export writes",
    )
    check = _command(commands, "check", "fail if a plan is not good enough", CHECK)
    check.add_argument(
        "--fail-on",
        metavar="CONDITIONS",
        default="",
        help="what is not good enough, separated by commas: NAME>LIMIT (without it only a plan that does not fit is)",
    )
    check.add_argument("--json", action="store_true", help="print numbers and conditions as JSON instead")
    export = _command(commands, "export", "write the plan for other programs", EXPORT)
    export.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".svg .png .dot .mmd .graphml .csv .json trace.json",
    )
    for command in (show, report, check, export):
        _add_planning(command, f"{_MODELS}, plan.json, run.json")
    report.add_argument(
        "beside", nargs="*", type=Path, metavar="PLAN.json", help="more plans or runs, to be compared with it"
    )
    _add_profile(commands)
    sweep = _command(commands, "sweep", "plan a model under many configurations", SWEEP)
    sweep.add_argument("spec", metavar="SPEC", help=_MODELS)
    _add_place(sweep)
    for name, what in (("stages", count), ("replicas", count), ("microbatches", count), ("schedule", str)):
        sweep.add_argument(f"--{name}", type=list_of(what), metavar="A,B,...", help="to be tried (default: chosen)")
    sweep.add_argument("--recompute", type=list_of(yes_or_no), metavar="no,yes", help="to be tried (default: chosen)")
    sweep.add_argument("--json", action="store_true", help="print the outcomes as JSON instead")
    _command(commands, "schema", "print the JSON Schema of plans", SCHEMA)
    compare = _command(commands, "compare", "put plans beside each other", COMPARE)
    compare.add_argument(
        "plans", nargs="+", type=Path, metavar="PLAN.json", help="plans or runs; the first is the reference"
    )
    compare.add_argument("--json", action="store_true", help="print numbers as JSON instead")


def given(options: argparse.Namespace, names: Sequence[str] = PLANNING) -> list[str]:
    """List those of the options that somebody gave, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]


def is_file_of_plan(spec: str) -> bool:
    """Say whether ``spec`` is the path of a plan or a run, and no model."""
    return Path(spec).is_file() or (spec.endswith(".json") and ":" not in spec)


def workers_of(text: str) -> list[int | str]:
    """Read ``--devices``: a count of CPU workers, or names of devices."""
    return ["cpu"] * int(text) if text.isdecimal() else [part.strip() for part in text.split(",")]


def _add_profile(commands: Any) -> None:
    profile = _command(commands, "profile", "run a model's training steps, and write what they took", PROFILE)
    _add_planning(profile, _MODELS, metavar="SPEC", costs="measured", cluster=_HERE)
    profile.add_argument(
        "--plan", type=Path, metavar="PLAN.json", help="a plan, or the run of one, to run as it is, on its devices"
    )
    profile.add_argument("--steps", type=count, default=5, metavar="N", help="measured after a warm-up (default: 5)")
    profile.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="run.json")
    profile.add_argument("--json", action="store_true", help="print the numbers as JSON instead")


def _command(commands: Any, name: str, does: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=does,
        description=f"{does[:1].upper()}{does[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_planning(
    parser: argparse.ArgumentParser,
    specs: str,
    metavar: str = "SPEC_OR_PLAN",
    costs: str = "analytic",
    cluster: str = _DESCRIBED,
) -> None:
    """Add what makes a plan."""
    parser.add_argument("spec", metavar=metavar, help=specs)
    _add_place(parser, costs, cluster)
    parser.add_argument("--stages", type=count, metavar="N", help="stages of the pipeline (default: chosen)")
    parser.add_argument("--replicas", type=count, metavar="N", help="copies of every stage (default: chosen)")
    parser.add_argument("--microbatches", type=count, metavar="M", help="pieces of the batch (default: chosen)")
    parser.add_argument(
        "--schedule",
        metavar="NAME|FILE",
        help=f"order of compute: {', '.join(TRAINING_SCHEDULES)}, search, or a .json or .csv file (default: chosen)",
    )


def _add_place(parser: argparse.ArgumentParser, costs: str = "analytic", cluster: str = _DESCRIBED) -> None:
    """Add what says where, with which batch and which costs."""
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--devices", metavar="N|LIST", help=f"N CPU workers, or names: cpu,cpu (default: {WORKERS})")
    place.add_argument("--cluster", metavar="KIND", help=cluster)
    parser.add_argument("--batch", type=count, metavar="N", help="rows of the example batch (default: the model's)")
    parser.add_argument(
        "--costs", choices=["analytic", "measured"], help=f"roofline, or each op timed on this CPU (default: {costs})"
    )
    parser.add_argument("--memory-gib", type=positive, metavar="X", help="memory limit of each worker")
