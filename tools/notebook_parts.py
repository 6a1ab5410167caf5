"""The pieces of HTML that a notebook's cell is made of; what comes from a model is escaped here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .svg_parts import escape
from .tables import Table

# A notebook keeps what its cells show; some hundred such cells are still quick to open.
MOST_BYTES = 300_000
_SCOPE = "stagecut"
_MOST_ROWS = 40
_MOST_COLUMNS = 160


def fitting(head: Sequence[str], pictures: Sequence[Callable[[], str]], rest: Sequence[str], elsewhere: str) -> str:
    """Put a cell together around the first of ``pictures`` that leaves it small enough, and say if others did not."""
    why = note(f"the whole picture is too large for a notebook{elsewhere}")
    for index, draw in enumerate(pictures):
        whole = _cell([*head, draw(), *([why] if index else []), *rest])
        if len(whole.encode()) <= MOST_BYTES:
            return whole
    return _cell([*head, why, *rest])


def _cell(parts: Sequence[str]) -> str:
    return f'<div class="{_SCOPE}">\n' + "\n".join(parts) + "\n</div>\n"


def heading(text: str) -> str:
    """Write a line in bold."""
    return f"<p><b>{escape(text)}</b></p>"


def note(text: str) -> str:
    """Write a line in small."""
    return f"<p><small>{escape(text)}</small></p>"


def picture(svg: str) -> str:
    """Show a standalone picture; its style sheet is kept from the other pictures of the notebook."""
    scoped = re.sub(r"(<style>)(.*?)(</style>)", lambda m: m[1] + _scoped(m[2]) + m[3], svg, count=1, flags=re.DOTALL)
    return f'<div style="overflow-x:auto">{scoped}</div>'


def _scoped(css: str) -> str:
    """Let rules apply below the cell only.

    >>> _scoped("text,rect.a{fill:red}@media (x){text{fill:blue}}")
    '.stagecut text,.stagecut rect.a{fill:red}@media (x){.stagecut text{fill:blue}}'
    """

    def prefixed(match: re.Match[str]) -> str:
        selectors = match[1].strip()
        if selectors.startswith("@"):
            return match[0]
        return ",".join(f".{_SCOPE} {selector.strip()}" for selector in selectors.split(",")) + "{"

    return re.sub(r"([^{}]+)\{", prefixed, css)


def table(content: Table) -> str:
    """Write a table, its first rows if there are many."""
    if not content.rows:
        return f"<p>{escape(content.empty)}</p>"
    head = "".join(_field("th", name, right) for name, right in zip(content.header, content.right))
    rows = [
        "".join(_field("td", value, right) for value, right in zip(row, content.right))
        for row in content.rows[:_MOST_ROWS]
    ]
    left = len(content.rows) - len(rows)
    more = note(f"and {left} more") if left > 0 else ""
    return f"<table>\n<tr>{head}</tr>\n" + "".join(f"<tr>{row}</tr>\n" for row in rows) + f"</table>{more}"


def _field(tag: str, value: str, right: bool) -> str:
    shown = value if len(value) <= _MOST_COLUMNS else f"{value[:_MOST_COLUMNS]}…"
    return f'<{tag} style="text-align:{"right" if right else "left"}">{escape(shown)}</{tag}>'
