"""The picture of a plan as PNG: the SVG rendered by resvg in one font, so that it is the same on every machine."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from ..errors import StagecutError
from ..partitioner.plan import Plan
from ..runtime.program import Timeline
from .svg import plan_svg

_INSTALL = 'pip install "stagecut[png]"'
_FAMILY = "DejaVu Sans"
_FACES = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
_SCALES = (2, 1)
# Larger textures than this do not exist on common graphics hardware, and viewers give up.
_LONGEST_SIDE = 16384
_SIZE = re.compile(r'^<svg [^>]*width="([\d.]+)" height="([\d.]+)"')


def plan_png(plan: Plan, measured: Timeline | None = None) -> bytes:
    """Draw ``plan`` as :func:`stagecut.tools.svg.plan_svg` does; equal plans give equal bytes.

    Raises:
        StagecutError: resvg or the font is not installed, or the picture is too large for a PNG.
    """
    return rendered(plan_svg(plan, plan.predicted, measured))


def rendered(svg: str) -> bytes:
    """Render a standalone picture, twice as large where that stays within what viewers show.

    Raises:
        StagecutError: as :func:`plan_png` says.
    """
    fonts = _fonts()
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise StagecutError("PNG needs resvg-py, which is not installed", hint=_INSTALL) from error
    picture: bytes = resvg_py.svg_to_bytes(
        svg_string=_writable(svg, fonts),
        zoom=_scale(svg),
        # The picture names fonts that a screen has; only the one that comes with matplotlib is there to be found.
        skip_system_fonts=True,
        font_files=[str(path) for path in fonts],
        font_family=_FAMILY,
        sans_serif_family=_FAMILY,
    )
    return picture


def _scale(svg: str) -> int:
    found = _SIZE.match(svg)
    assert found is not None, "a picture says how large it is"
    longest = max(map(float, found.groups()))
    for scale in _SCALES:
        if longest * scale <= _LONGEST_SIDE:
            return scale
    raise StagecutError(
        f"a picture of {longest:.0f} pixels is too large for a PNG (the limit is {_LONGEST_SIDE})",
        hint="write a .svg, which has no limit",
    )


def _fonts() -> list[Path]:
    """Find the font files among those that matplotlib brings, without importing it."""
    spec = importlib.util.find_spec("matplotlib")
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    for folder in folders:
        paths = [folder / "mpl-data" / "fonts" / "ttf" / face for face in _FACES]
        if all(path.is_file() for path in paths):
            return paths
    raise StagecutError("PNG needs the font DejaVu Sans of matplotlib, which is not installed", hint=_INSTALL)


def _writable(svg: str, fonts: list[Path]) -> str:
    r"""Write what the font has no sign for by its code (``\u6f22``), as the terminal does, and not as a box."""
    try:
        from fontTools.ttLib import TTFont
    except ModuleNotFoundError as error:
        raise StagecutError("PNG needs fonttools, which is not installed", hint=_INSTALL) from error
    others = set(filter(lambda c: not c.isascii(), svg))
    for path in fonts:
        with TTFont(path, lazy=True) as font:
            signs = font.getBestCmap()
        missing = {c for c in others if ord(c) not in signs}
        svg = svg.translate({ord(c): c.encode("unicode_escape").decode() for c in missing})
        others -= missing
    return svg
