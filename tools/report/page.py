"""The page of the report: its policy, style and script, what is shown without scripts, and the data in little room."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from importlib.resources import files

from ...errors import StagecutError
from ..compare import moves, numbers_table
from ..style import STAGE_COLOURS, drawing_rules, page_rules
from ..svg_parts import escape
from ..verdict import WAITING_FOR
from .payload import Shown, payload
from .static import static_body

# In the order in which they build on each other; each is one idea.
SCRIPTS = (
    "words", "elements", "state", "plan", "fold", "order", "layout", "overview", "graph", "details", "move", "stages",
    "timeline", "memory", "whatif", "compare", "help", "main",
)  # fmt: skip


def report_html(shown: Sequence[Shown]) -> str:
    """Write one page about plans: linked views of each, and what they have beside each other.

    The page is whole in itself: its policy lets nothing be loaded and nothing run but its own script. Equal arguments
    give equal bytes.

    Raises:
        StagecutError: there is no plan to show.
    """
    if not shown:
        raise StagecutError("a report takes one plan or more", hint="partition-viz report PLAN.json -o plan.html")
    style, script = _style(), _script()
    data = {
        "plans": [payload(each) for each in shown],
        "comparison": _comparison(shown),
        "colours": list(STAGE_COLOURS),
        "waiting_for": WAITING_FOR,
    }
    title = escape(", ".join(dict.fromkeys(each.plan.model for each in shown)))
    without = "\n".join(static_body(each.plan, each.plan.predicted, each.measured) for each in shown)
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}: plan</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<noscript>\n<main>\n{without}\n</main>\n</noscript>\n"
        '<div id="report" hidden></div>\n'
        f'<script type="application/octet-stream" id="data">{_packed(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _packed(data: object) -> str:
    """Compress data with zlib, in base64, which nothing in a page takes for markup."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _comparison(shown: Sequence[Shown]) -> dict[str, object] | None:
    """Write the numbers of several plans beside each other, and what moved against the first."""
    if len(shown) < 2:
        return None
    table = numbers_table([each.name for each in shown], [(each.plan, each.run) for each in shown])
    moved = [moves(shown[0].plan, each.plan) for each in shown[1:]]
    return {"header": table.header, "rows": table.rows, "moves": moved}


def _style() -> str:
    colours = "".join(f":root{{--stage-{i}:{colour}}}" for i, colour in enumerate(STAGE_COLOURS))
    without = f"@media (scripting:none){{{drawing_rules()}{page_rules()}}}"
    return f"{colours}\n{_asset('report.css')}\n{without}"


def _script() -> str:
    body = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    return f'"use strict";(()=>{{\n{body}\n}})();'


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
