"""The few SVG elements that the drawings are made of, as text; what comes from a model is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from .style import drawing_rules
from .words import clean


@dataclass(frozen=True)
class Drawing:
    """A piece of a picture: its elements and how much room they take."""

    width: float
    height: float
    body: str


def escape(text: str) -> str:
    """Make a name inert in XML and HTML, as content and between quotes.

    >>> escape('<img src="x">')
    '&lt;img src=&quot;x&quot;&gt;'
    """
    return html.escape(clean(text), quote=True)


def number(value: float) -> str:
    """Write a coordinate, the same on every machine.

    >>> number(12.0), number(0.123), number(-0.001)
    ('12', '0.12', '0')
    """
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def rect(kind: str, x: float, y: float, width: float, height: float, *, radius: float = 0.0, tip: str = "") -> str:
    """Draw a rectangle; ``tip`` is shown under the pointer."""
    place = f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 0.0))}" height="{number(height)}"'
    rounded = f' rx="{number(radius)}"' if radius else ""
    end = f"><title>{escape(tip)}</title></rect>" if tip else "/>"
    return f'<rect class="{kind}" {place}{rounded}{end}'


def text(kind: str, x: float, y: float, content: str) -> str:
    """Write a line of text; ``y`` is its base line."""
    return f'<text class="{kind}" x="{number(x)}" y="{number(y)}">{escape(content)}</text>'


def path(kind: str, points: Sequence[tuple[float, float]], *, radius: float = 3.0, tip: str = "") -> str:
    """Draw a line through ``points`` with rounded corners."""
    parts = [f"M{number(points[0][0])} {number(points[0][1])}"]
    for before, corner, after in zip(points, points[1:], points[2:]):
        near, far = _towards(corner, before, radius), _towards(corner, after, radius)
        parts.append(f"L{number(near[0])} {number(near[1])}Q{number(corner[0])} {number(corner[1])}")
        parts.append(f" {number(far[0])} {number(far[1])}")
    parts.append(f"L{number(points[-1][0])} {number(points[-1][1])}")
    end = f"><title>{escape(tip)}</title></path>" if tip else "/>"
    return f'<path class="{kind}" d="{"".join(parts)}"{end}'


def tip_right(kind: str, x: float, y: float) -> str:
    """Draw an arrowhead that ends at ``x``, ``y`` and points to the right."""
    return f'<path class="{kind}" d="M{number(x - 5)} {number(y - 3)}l5 3l-5 3z"/>'


def moved(drawing: Drawing, x: float, y: float) -> str:
    """Put a drawing somewhere in another."""
    return f'<g transform="translate({number(x)} {number(y)})">{drawing.body}</g>'


def stack(drawings: Sequence[Drawing], gap: float = 18.0, margin: float = 0.0) -> Drawing:
    """Put drawings under each other."""
    parts, y = [], margin
    for drawing in drawings:
        parts.append(moved(drawing, margin, y))
        y += drawing.height + gap
    width = max((drawing.width for drawing in drawings), default=0.0)
    return Drawing(width + 2 * margin, y - gap + margin, "\n".join(parts))


def document(drawing: Drawing, title: str, *, styled: bool) -> str:
    """Make an ``<svg>`` element; a standalone picture is ``styled``, one in a page uses the page's style sheet."""
    width, height = number(drawing.width), number(drawing.height)
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if styled else ""  # a page knows what svg is
    paper = rect("paper", 0, 0, drawing.width, drawing.height)
    style = f"<style>\n{drawing_rules()}</style>\n{paper}\n" if styled else ""
    return (
        f'<svg{namespace} viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">\n{style}{drawing.body}\n</svg>\n'
    )


def _towards(corner: tuple[float, float], other: tuple[float, float], radius: float) -> tuple[float, float]:
    across, down = other[0] - corner[0], other[1] - corner[1]
    length = abs(across) + abs(down)
    part = min(radius, length / 2) / length if length else 0.0
    return corner[0] + across * part, corner[1] + down * part
