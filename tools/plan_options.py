"""What the subcommands of ``partition-viz`` that take plans can be told; imports next to nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..runtime.schedules import TRAINING_SCHEDULES
from .arguments import count, list_of, positive, yes_or_no

WORKERS = "2"
# Options that make a plan, with what they are when nobody gave them; a plan file has its answers already.
PLANNING = ("devices", "cluster", "stages", "replicas", "microbatches", "schedule", "batch", "costs", "memory_gib")

_MODELS = "demo:resnet, torchvision:NAME, timm:NAME, hf:TYPE, file.py:FUNCTION"
_CODES = "exit codes: 0 done, 2 wrong arguments or a bad plan, 3 the model cannot be captured, 4 no plan fits\n"

_SHOW = f"""examples:
  partition-viz show demo:resnet --devices 4
  partition-viz show plan.json
  partition-viz show hf:bert --cluster sim:8xH100-80GB --replicas 2
  partition-viz show train.py:build --devices cpu,cpu --schedule 1f1b --json > plan.json

{_CODES}"""

_REPORT = f"""examples:
  partition-viz report plan.json -o plan.html
  partition-viz report demo:unet --cluster sim:8xH100-80GB --replicas 2 -o plan.svg
  partition-viz report timm:resnet18 --devices 2 -o plan.png       (pip install "stagecut[png]")
  partition-viz report plan.json -o trace.json                     (open it at ui.perfetto.dev)

{_CODES}"""

_SCHEMA = """examples:
  partition-viz schema > plan.schema.json
  partition-viz schema | python -m json.tool --compact

exit codes: 0 done, 2 wrong arguments
"""

_CHECK = """examples:
  partition-viz check plan.json
  partition-viz check plan.json --fail-on 'bubble>0.25,imbalance>1.15'
  partition-viz check train.py:build --cluster sim:4xA100-80GB --fail-on 'step>200ms,filled>90%,speedup<3' --json

exit codes: 0 no condition holds, 1 one does, 2 wrong arguments or a bad plan, 3 the model cannot be captured,
4 no plan fits
"""

_COMPARE = """examples:
  partition-viz compare before.json after.json
  partition-viz compare plans/*.json --json

exit codes: 0 done, 2 wrong arguments or a bad plan
"""

_EXPORT = f"""examples:
  partition-viz export plan.json -o plan.dot          (Graphviz: every op, in stages)
  partition-viz export plan.json -o plan.mmd          (Mermaid: the stages and what crosses)
  partition-viz export plan.json -o plan.graphml      (networkx, Gephi, yEd: ops with their costs)
  partition-viz export plan.json -o ops.csv           (a row for each op)
  partition-viz export plan.json -o plan.png          (pip install "stagecut[png]")
  partition-viz export demo:unet --devices 2 -o plan.json

{_CODES}"""

_SWEEP = """examples:
  partition-viz sweep demo:resnet --devices 4 --stages 2,4 --microbatches 4,8,16
  partition-viz sweep torchvision:resnet50 --cluster sim:4xA100-80GB --schedule 1f1b,zb-h1 --recompute no,yes --json

every combination is planned; "best" has no other one with a shorter step and as little memory

exit codes: 0 done, 2 wrong arguments, 3 the model cannot be captured, 4 no combination has a plan
"""


def add_plan_commands(commands: Any) -> None:
    """Add the subcommands' parsers."""
    show = _command(commands, "show", "print the plan as tables", _SHOW)
    show.add_argument("--json", action="store_true", help="print the plan as JSON instead")
    report = _command(commands, "report", "write the plan as a page or a picture", _REPORT)
    report.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="plan.html, plan.svg or plan.png for the picture alone, or trace.json for Perfetto",
    )
    check = _command(commands, "check", "fail if a plan is not good enough", _CHECK)
    check.add_argument(
        "--fail-on",
        metavar="CONDITIONS",
        default="",
        help="what is not good enough, separated by commas: NAME>LIMIT (without it only a plan that does not fit is)",
    )
    check.add_argument("--json", action="store_true", help="print numbers and conditions as JSON instead")
    export = _command(commands, "export", "write the plan for other programs", _EXPORT)
    export.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".svg .png .dot .mmd .graphml .csv .json trace.json",
    )
    for command in (show, report, check, export):
        _add_planning(command)
    sweep = _command(commands, "sweep", "plan a model under many configurations", _SWEEP)
    sweep.add_argument("spec", metavar="SPEC", help=_MODELS)
    _add_place(sweep)
    for name, what in (("stages", count), ("replicas", count), ("microbatches", count), ("schedule", str)):
        sweep.add_argument(f"--{name}", type=list_of(what), metavar="A,B,...", help="to be tried (default: chosen)")
    sweep.add_argument("--recompute", type=list_of(yes_or_no), metavar="no,yes", help="to be tried (default: chosen)")
    sweep.add_argument("--json", action="store_true", help="print the outcomes as JSON instead")
    schema = _command(commands, "schema", "print the JSON Schema of plans", _SCHEMA)
    schema.add_argument("--json", action="store_true", help="as it is anyway: every command that prints takes this")
    compare = _command(commands, "compare", "put plans beside each other", _COMPARE)
    compare.add_argument("plans", nargs="+", type=Path, metavar="PLAN.json", help="plans; the first is the reference")
    compare.add_argument("--json", action="store_true", help="print numbers as JSON instead")


def _command(commands: Any, name: str, does: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=does,
        description=f"{does[:1].upper()}{does[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_planning(parser: argparse.ArgumentParser) -> None:
    """Add what makes a plan."""
    parser.add_argument("spec", metavar="SPEC_OR_PLAN", help=f"{_MODELS}, plan.json")
    _add_place(parser)
    parser.add_argument("--stages", type=count, metavar="N", help="stages of the pipeline (default: chosen)")
    parser.add_argument("--replicas", type=count, metavar="N", help="copies of every stage (default: chosen)")
    parser.add_argument("--microbatches", type=count, metavar="M", help="pieces of the batch (default: chosen)")
    parser.add_argument(
        "--schedule",
        metavar="NAME|FILE",
        help=f"order of compute: {', '.join(TRAINING_SCHEDULES)}, search, or a .json or .csv file (default: chosen)",
    )


def _add_place(parser: argparse.ArgumentParser) -> None:
    """Add what says where, with which batch and which costs."""
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--devices", metavar="N|LIST", help=f"N CPU workers, or names: cpu,cpu (default: {WORKERS})")
    place.add_argument("--cluster", metavar="KIND", help="devices that need not exist: sim:4xA100-80GB, cluster.toml")
    parser.add_argument("--batch", type=count, metavar="N", help="rows of the example batch (default: the model's)")
    parser.add_argument(
        "--costs", choices=["analytic", "measured"], help="roofline, or each op timed on this CPU (default: analytic)"
    )
    parser.add_argument("--memory-gib", type=positive, metavar="X", help="memory limit of each worker")
