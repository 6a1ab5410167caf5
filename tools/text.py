"""A plan as text: the verdict, tables with units, the grid of a step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ..partitioner.measured_run import MeasuredRun
from ..partitioner.plan import Plan
from ..runtime.program import Timeline
from .compare import Given, moves, numbers_table
from .measured import comparisons, measured_step, measured_table, measured_title
from .style import STAGE_COLOURS
from .tables import Table, alternatives_table, stage_table, wire_table
from .verdict import judge
from .words import clean, share

_PIPED_WIDTH = 10_000  # a table takes what it needs: a pipe has no edge to wrap at


def console_for(stream: TextIO | None = None) -> Console:
    """Return a console for ``stream`` (stdout): coloured on a terminal unless ``NO_COLOR`` is set, else plain ASCII."""
    stream = stream or sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, width=_PIPED_WIDTH, color_system=None)


def print_plan(plan: Plan, timeline: Timeline, console: Console, run: MeasuredRun | None = None) -> None:
    """Print what ``plan`` decides and what it is expected to cost, and what a ``run`` of it took."""
    verdict = judge(plan, timeline)
    _say(console, f"{clean(plan.model)}: {verdict.line()}", "bold")
    for line in (verdict.cut, verdict.crossing, verdict.waiting, verdict.fit):
        _say(console, f"  {line}")
    _section(console, "stages, costs of one microbatch", stage_table(plan), n_colours=len(plan.stages))
    _section(console, "what crosses", wire_table(plan))
    _say(console, f"\n{timeline.source} step, bubble {share(timeline.bubble)}", "bold")
    _say(console, "0-9 forward of that microbatch, a-j its backward, . no compute; numbers repeat after ten", "dim")
    _say(console, timeline.grid(), wrap=False)
    if run is not None:
        _say(console, f"\n{measured_step(run)}", "bold")
        _say(console, run.timeline.grid(), wrap=False)
        _section(console, measured_title(run), measured_table(comparisons(run, timeline)))
    _section(console, "what was considered", alternatives_table(plan))
    if plan.reasons:
        _say(console, "\nwhy", "bold")
    for reason in plan.reasons:
        _say(console, f"  {reason}")


def print_table(title: str, table: Table, console: Console) -> None:
    """Print one table."""
    _section(console, title, table)


def print_comparison(names: Sequence[str], plans: Sequence[Given], console: Console) -> None:
    """Print the numbers of plans beside each other, and which ops are on other stages than in the first one."""
    first = plans[0][0]
    _section(console, f"{clean(first.model)}: against {clean(names[0])}", numbers_table(names, plans))
    for name, (plan, _) in zip(names[1:], plans[1:]):
        _say(console, f"\n{clean(name)}", "bold")
        for line in moves(first, plan):
            _say(console, f"  {line}")


def _section(console: Console, title: str, table: Table, n_colours: int = 0) -> None:
    _say(console, f"\n{title}", "bold")
    if not table.rows:
        _say(console, table.empty)
        return
    grid = RichTable(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII, pad_edge=False)
    for name, right in zip(table.header, table.right):
        grid.add_column(name, justify="right" if right else "left", overflow="fold")
    for index, row in enumerate(table.rows):
        style = STAGE_COLOURS[index % len(STAGE_COLOURS)] if index < n_colours else ""
        cells = [_text(console, value) for value in row]
        cells[0].stylize(style)
        grid.add_row(*cells)
    console.print(grid)


def _say(console: Console, line: str, style: str = "", *, wrap: bool = True) -> None:
    text = _text(console, line)
    text.stylize(style)
    console.print(text, soft_wrap=not wrap)


def _text(console: Console, value: str) -> Text:
    """Take names as they are, not as markup; in ASCII where the output is no terminal."""
    return Text(value if console.is_terminal else value.encode("ascii", "backslashreplace").decode())
