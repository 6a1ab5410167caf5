"""The colours: one per stage, safe for colour-blind readers, in a light and a dark sheet."""

from __future__ import annotations

# Okabe and Ito, "Color Universal Design" (2008), https://jfly.uni-koeln.de/color/; grey for black, which is text.
STAGE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8a8a8a")
_DARK_ON_COLOUR, _LIGHT_ON_COLOUR = "#111111", "#ffffff"
_NEEDS_LIGHT_TEXT = {"#0072b2"}

_LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "dim": "#57606a",
    "rule": "#d0d7de",
    "soft": "#eef1f4",
    "edge": "#9aa4af",
}
_DARK = {
    "paper": "#12161c",
    "ink": "#e8ecf0",
    "dim": "#a3adb8",
    "rule": "#3a434d",
    "soft": "#1e252d",
    "edge": "#6b7682",
}
_TINT_LIGHT, _TINT_DARK = 0.30, 0.38

_SHAPES = """
text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
text.h{font-size:14px;font-weight:600}
text.b{font-weight:600}
text.s{font-size:9.5px}
text.m{text-anchor:middle}
text.e{text-anchor:end}
path.edge{fill:none;stroke-width:1}
path.wire{fill:none;stroke-width:2}
rect.input{fill:none;stroke-width:1;stroke-dasharray:3 2}
rect.box,rect.key,rect.tag{stroke-width:1}
"""

_PAGE = """
body{margin:0;font:14px/1.4 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1400px;margin:0 auto;padding:14px 20px 40px}
h1{font-size:20px;margin:0}
h2{font-size:16px;margin:18px 0 6px}
p{margin:4px 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(220px,1fr));gap:10px;margin-top:10px}
.card{border-radius:6px;padding:8px 12px}
.card h2{font-size:12px;font-weight:500;margin:0}
.card b{font-size:20px}
.card p{font-size:12px;margin:0;overflow-wrap:anywhere}
.wide{overflow-x:auto}
svg{display:block;width:100%;min-width:900px;height:auto}
table{font-size:13px;border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:3px 12px 3px 0;text-align:left;border-bottom:1px solid;white-space:nowrap}
.right{text-align:right}
details{margin-top:16px}
summary{cursor:pointer}
"""


def stage_class(stage: int) -> str:
    """Name the class of a stage's colour; colours repeat after eight, so numbers are always written as well."""
    return f"c{stage % len(STAGE_COLOURS)}"


def drawing_rules() -> str:
    """Return the style sheet of all drawings; without variables and imports, which librsvg and mail readers lack."""
    return f"{_SHAPES.strip()}\n{_theme(_LIGHT, _TINT_LIGHT)}\n{_in_the_dark(_theme(_DARK, _TINT_DARK))}"


def _theme(base: dict[str, str], tint: float) -> str:
    rules = [
        f"rect.paper{{fill:{base['paper']}}}",
        f"text{{fill:{base['ink']}}}",
        f"text.dim{{fill:{base['dim']}}}",
        f"path.edge{{stroke:{base['edge']}}}path.tip{{fill:{base['edge']}}}",
        f"path.wire{{stroke:{base['ink']}}}path.wiretip{{fill:{base['ink']}}}",
        f"path.rule{{stroke:{base['rule']};stroke-width:1}}",
        f"rect.input{{stroke:{base['dim']}}}",
        f"rect.lane{{fill:{base['soft']};stroke:{base['rule']};stroke-width:1}}",
        f"rect.tag{{fill:{base['paper']};stroke:{base['ink']}}}",
        f"rect.send{{fill:{base['dim']}}}",
        f"rect.other{{fill:{base['edge']}}}",
    ]
    for stage, colour in enumerate(STAGE_COLOURS):
        name = stage_class(stage)
        on_colour = _LIGHT_ON_COLOUR if colour in _NEEDS_LIGHT_TEXT else _DARK_ON_COLOUR
        rules += [
            f"rect.band.{name}{{fill:{_mix(colour, base['paper'], 0.09)}}}",
            f"rect.fwd.{name},rect.box.{name}{{fill:{_mix(colour, base['paper'], tint)};stroke:{colour}}}",
            f"rect.bwd.{name}{{fill:{colour}}}text.on.{name}{{fill:{on_colour}}}",
        ]
    return "\n".join(rules)


def _mix(colour: str, paper: str, amount: float) -> str:
    """Mix two colours.

    >>> _mix("#ff0000", "#ffffff", 0.5)
    '#ff8080'
    """
    parts = [(int(colour[i : i + 2], 16), int(paper[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(own * amount + under * (1 - amount)):02x}" for own, under in parts)


def page_rules() -> str:
    """Return the style sheet of a page around the drawings."""
    return f"{_PAGE.strip()}\n{_page_theme(_LIGHT)}\n{_in_the_dark(_page_theme(_DARK))}"


def _in_the_dark(rules: str) -> str:
    return f"@media (prefers-color-scheme:dark){{\n{rules}\n}}\n"


def _page_theme(base: dict[str, str]) -> str:
    return "\n".join(
        [
            f"body{{background:{base['paper']};color:{base['ink']}}}",
            f".card{{background:{base['soft']}}}.card h2,.card p,summary{{color:{base['dim']}}}",
            f"td,th{{border-color:{base['rule']}}}",
        ]
    )
