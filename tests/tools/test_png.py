import importlib.util
import io
import re
import sys
from dataclasses import replace

import pytest

from stagecut.tools.partition_viz import main
from stagecut.tools.png import plan_png, rendered
from stagecut.tools.svg import plan_svg

PIP = 'pip install "stagecut[png]"'
MODULES = ("resvg_py", "matplotlib", "fontTools")
needs_png = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, MODULES)), reason=f"what writes PNG is not installed: {PIP}"
)


def image(content):
    pillow = pytest.importorskip("PIL.Image")
    return pillow.open(io.BytesIO(content)).convert("L")


def dark_pixels(content, box):
    return sum(value < 100 for value in image(content).crop(box).tobytes())


def written(text):
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="300" height="40"><text x="5" y="20">{text}</text></svg>'


@needs_png
@pytest.mark.parametrize("command", ["export", "report"])
def test_the_file_is_a_png_with_the_same_bytes_every_time(plan, saved, tmp_path, capsys, command):
    output = tmp_path / "plan.png"
    assert main([command, saved, "-o", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert output.read_bytes() == plan_png(plan)
    assert capsys.readouterr().out == ""


@needs_png
def test_the_picture_is_as_large_as_the_svg_twice_and_has_its_text(plan):
    svg = plan_svg(plan, plan.predicted)
    size = [float(value) for value in re.match(r'<svg [^>]*width="(.*?)" height="(.*?)"', svg).groups()]
    content = plan_png(plan)
    assert image(content).size == tuple(pytest.approx(2 * side, abs=2) for side in size)
    title = (28, 0, 600, 60)
    assert dark_pixels(content, title) > 500
    assert dark_pixels(rendered(re.sub("<text.*?</text>", "", svg)), title) == 0


@needs_png
def test_a_sign_that_the_font_lacks_is_written_as_its_code():
    assert rendered(written("漢")) == rendered(written(r"\u6f22"))
    assert rendered(written("é ▼ Ж")) != rendered(written(r"\xe9 \u25bc \u0416"))


@needs_png
def test_names_of_a_model_stay_text(hostile_plan):
    assert plan_png(hostile_plan) != plan_png(replace(hostile_plan, model="other"))


@needs_png
def test_a_picture_that_viewers_cannot_show_is_refused(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stagecut.tools.png._LONGEST_SIDE", 100)
    assert main(["export", saved, "-o", str(tmp_path / "plan.png")]) == 2
    assert "too large for a PNG" in (said := capsys.readouterr().err)
    assert "try: write a .svg" in said
    assert not (tmp_path / "plan.png").exists()


@pytest.mark.parametrize(("missing", "named"), [("resvg_py", "resvg-py"), ("fontTools", "fonttools")])
@needs_png
def test_without_the_extra_the_pip_line_is_said(saved, tmp_path, monkeypatch, capsys, missing, named):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, f"{missing}.ttLib", None)
    assert main(["export", saved, "-o", str(tmp_path / "plan.png")]) == 2
    said = capsys.readouterr().err
    assert f"{named}, which is not installed" in said
    assert PIP in said


def test_without_a_font_nothing_is_written(saved, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert main(["export", saved, "-o", str(tmp_path / "plan.png")]) == 2
    assert "the font DejaVu Sans of matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "plan.png").exists()
