"""The command ``partition-viz``: show a plan in the terminal, or write it as a page or a picture."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CaptureError, InfeasibleError, StagecutError
from ..partitioner.plan import Plan, schema
from ..records import to_json
from .command_files import PAGES, check_files, short_names
from .completion import add_completion, completion_text
from .plan_options import GIB, WORKERS, add_plan_commands, given, is_file_of_plan, workers_of
from .schedule import add_schedule, schedule_text
from .solve import add_solve, solve_text

if TYPE_CHECKING:
    from ..partitioner.measured_run import MeasuredRun

# What imports torch is imported where it is used: help and wrong arguments answer in a tenth of a second, not in three.

OK, FAILED, USAGE, NOT_CAPTURABLE, DOES_NOT_FIT = 0, 1, 2, 3, 4

_EXAMPLES = """examples:
  partition-viz show demo:resnet --devices 4
  partition-viz show torchvision:resnet50 --cluster sim:4xA100-80GB --batch 64
  partition-viz show train.py:build --devices cpu,cpu --schedule 1f1b --json > plan.json
  partition-viz report plan.json -o plan.html
  partition-viz export plan.json -o trace.json    (open it at ui.perfetto.dev)
  partition-viz report demo:unet --cluster sim:8xH100-80GB --replicas 2 -o plan.svg
  partition-viz check plan.json --fail-on 'bubble>0.25,imbalance>1.15'
  partition-viz sweep demo:resnet --devices 4 --stages 2,4 --microbatches 4,8,16
  partition-viz compare before.json after.json
  partition-viz export plan.json -o plan.dot
  partition-viz profile demo:mlp --devices cpu,cpu -o run.json
  partition-viz solve graph.json --max-chunks 2 --json > cut.json
  partition-viz schedule --costs costs.json --name search --microbatches 24
  partition-viz completion bash

exit codes: 0 done, 1 a condition of check holds, 2 wrong arguments, 3 the model cannot be captured, 4 no plan fits
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = _parser()
    arguments = sys.argv[1:] if argv is None else argv
    lacking = _lacking(parser, arguments)
    if lacking is not None:
        lacking.print_help(sys.stderr)
        return USAGE
    try:
        options = parser.parse_args(arguments)
    except SystemExit as error:  # argparse has printed why
        return error.code if isinstance(error.code, int) else USAGE
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _run(options)


def _lacking(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.ArgumentParser | None:
    """Return the parser of what stands alone and cannot: the command, or a subcommand that has to be told more."""
    if not arguments:
        return parser
    (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    command: argparse.ArgumentParser | None = commands.get(arguments[0]) if len(arguments) == 1 else None
    return command if command is not None and any(action.required for action in command._actions) else None


def _run(options: argparse.Namespace) -> int:
    try:
        if options.command == "solve":
            return _print(solve_text(options))
        if options.command == "schedule":
            return _print(schedule_text(options))
        if options.command == "schema":
            return _print(json.dumps(schema(), indent=1) + "\n")
        if options.command == "completion":
            return _print(completion_text(_parser(), options.shell))
        if options.command == "compare":
            return _compare(options.plans, options.json)
        if options.command == "sweep":
            return _sweep(options)
        if options.command == "profile":
            check_files(options)
            return _profile(options)
        check_files(options)
        plan, run = _plan(options)
        if options.command == "report":
            return _report(plan, run, options)
        if options.command == "export":
            return _export(plan, run, options.output)
        if options.command == "check":
            return _check(plan, run, options)
        return _show(plan, run, options.json)
    except BrokenPipeError:  # the reader had enough, as `head` does; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (StagecutError, OSError) as error:
        print(f"partition-viz: {error}", file=sys.stderr)
        return _code(error)


def _code(error: Exception) -> int:
    if isinstance(error, InfeasibleError):
        return DOES_NOT_FIT
    return NOT_CAPTURABLE if isinstance(error, CaptureError) else USAGE


def _show(plan: Plan, run: MeasuredRun | None, as_json: bool) -> int:
    if as_json:
        return _print(json.dumps(to_json(run or plan), indent=1) + "\n")
    from .text import console_for, print_plan

    console = console_for()
    with console.capture() as text:  # rich ends the process with 1 when the reader of a pipe leaves
        print_plan(plan, plan.predicted, console, run)
    return _print(text.get())


def _profile(options: argparse.Namespace) -> int:
    from .profile import profile

    run = profile(options)
    run.save(options.output)
    print(f"wrote {options.output}", file=sys.stderr)
    from .measured import comparisons, measured_json, measured_table, measured_title
    from .text import console_for, print_table

    predicted = run.plan.predicted
    if options.json:
        return _print(measured_json(run, predicted))
    console = console_for()
    with console.capture() as text:
        print_table(measured_title(run), measured_table(comparisons(run, predicted)), console)
    return _print(text.get())


def _print(text: str) -> int:
    sys.stdout.write(text)
    sys.stdout.flush()
    return OK


def _report(plan: Plan, run: MeasuredRun | None, options: argparse.Namespace) -> int:
    if options.output.suffix.lower() not in PAGES:
        if options.beside:
            raise StagecutError(f"{options.output} has room for one plan", hint="-o report.html shows several")
        return _export(plan, run, options.output)
    from ..partitioner.measured_run import read_plan
    from .report import Shown, report_html

    names = short_names([options.spec, *map(str, options.beside)])
    plans = [(plan, run), *map(read_plan, options.beside)]
    return _write(report_html([Shown(name, *given) for name, given in zip(names, plans)]), options.output)


def _check(plan: Plan, run: MeasuredRun | None, options: argparse.Namespace) -> int:
    from .check import check_text

    text, passes = check_text(plan, options.fail_on, run, as_json=options.json)
    _print(text)
    return OK if passes else FAILED


def _export(plan: Plan, run: MeasuredRun | None, output: Path) -> int:
    from .export import exported

    return _write(exported(plan, output, None if run is None else run.timeline), output)


def _write(content: str | bytes, output: Path) -> int:
    output.write_bytes(content if isinstance(content, bytes) else content.encode())
    print(f"wrote {output}", file=sys.stderr)
    return OK


def _compare(paths: list[Path], as_json: bool) -> int:
    from ..partitioner.measured_run import read_plan
    from .compare import check_count, record

    check_count(paths)
    plans, names = [read_plan(path) for path in paths], [str(path) for path in paths]
    if as_json:
        return _print(record(names, plans))
    from .text import console_for, print_comparison

    console = console_for()
    with console.capture() as text:
        print_comparison(names, plans, console)
    return _print(text.get())


def _plan(options: argparse.Namespace) -> tuple[Plan, MeasuredRun | None]:
    """Read the plan, and the run if it has one; or load the model and make a plan.

    Raises:
        StagecutError: there is no such model or plan, or no plan fits.
    """
    from ..partitioner.measured_run import read_plan

    spec: str = options.spec
    if is_file_of_plan(spec):
        useless = given(options)
        if useless:
            raise StagecutError(
                f"{spec} is a plan that is made already; {', '.join(useless)} cannot change it",
                hint="give a model spec instead, such as demo:resnet",
            )
        return read_plan(spec)
    plan = _planner(options)(
        stages=options.stages,
        replicas=options.replicas,
        microbatches=options.microbatches,
        schedule=options.schedule,
    )
    return plan, None


def _planner(options: argparse.Namespace) -> Callable[..., Plan]:
    """Load the model; return what plans it with more arguments of :func:`stagecut.plan`."""
    from ..api import plan as make_plan
    from ..models.registry import load_model

    model = load_model(options.spec, batch_rows=options.batch)
    return partial(
        make_plan,
        model.module,
        options.cluster or workers_of(options.devices or WORKERS),
        example_inputs=model.example_inputs,
        example_kwargs=model.example_kwargs,
        costs=options.costs or "analytic",
        memory_bytes=None if options.memory_gib is None else options.memory_gib * GIB,
    )


def _sweep(options: argparse.Namespace) -> int:
    from .sweep import VARIED, configurations, sweep, sweep_json
    from .text import console_for, print_table

    outcomes = sweep(_planner(options), configurations({name: getattr(options, name) for name in VARIED}))
    if options.json:
        _print(sweep_json(outcomes))
    else:
        from .sweep import sweep_table

        console = console_for()
        with console.capture() as text:
            print_table(f"{options.spec}: {len(outcomes)} configurations", sweep_table(outcomes), console)
        _print(text.get())
    return OK if any(outcome.problem is None for outcome in outcomes) else DOES_NOT_FIT


def _warn(message: Warning | str, *place: Any, **more: Any) -> None:
    """Print a warning as one line; where in stagecut it was raised helps nobody here."""
    print(f"partition-viz: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="partition-viz",
        description="Show how a model is cut into stages, what crosses between them, and who waits when.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_plan_commands(commands)
    add_solve(commands)
    add_schedule(commands)
    add_completion(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
