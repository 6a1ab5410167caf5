import html
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn

import stagecut
from stagecut.representation import GROUP
from stagecut.runtime.program import Timeline
from stagecut.tools import notebook_parts
from stagecut.tools.notebook import capture_html, interactive, pipeline_html, plan_html, timeline_html
from stagecut.tools.words import share

MOST_BYTES = 300_000
TAGS = {
    "div",
    "p",
    "b",
    "small",
    "pre",
    "style",
    "table",
    "tr",
    "th",
    "td",
    "svg",
    "g",
    "rect",
    "path",
    "text",
    "title",
}


class Reader(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def is_inert(page):
    reader = Reader(page)
    inert = reader.tags <= TAGS and not any(name.startswith("on") for name in reader.attributes)
    return inert and not reader.attributes & {"src", "href", "srcdoc"} and "\x1b" not in page


@pytest.fixture
def entry_points(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    return project["entry-points"][GROUP]


@pytest.fixture
def installed(entry_points, tmp_path):
    """Return a folder with the metadata that an installation has."""
    folder = tmp_path / "site"
    info = folder / f"stagecut-{stagecut.__version__}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: stagecut\nVersion: {stagecut.__version__}\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
    return folder


@pytest.fixture
def many_spans(timeline):
    return Timeline(
        "measured", 3, tuple(replace(span, start_s=span.start_s) for _ in range(200) for span in timeline.spans)
    )


def test_a_plan_is_a_picture_and_tables(plan):
    page = plan_html(plan)
    reader = Reader(page)
    assert is_inert(page)
    assert {"svg", "table"} <= reader.tags
    for part in (
        "limited by stage",
        "stage 2",
        "per microbatch",
        "against chosen",
        *(wire.value for wire in plan.wires),
    ):
        assert part in reader.text
    assert len(page.encode()) <= MOST_BYTES
    assert plan_html(replace(plan)) == page


def test_the_style_sheet_of_a_cell_is_for_that_cell_only(plan):
    (css,) = re.findall(r"<style>(.*?)</style>", plan_html(plan), re.DOTALL)
    selectors = [s.strip() for found in re.findall(r"([^{}]+)\{", css) for s in found.split(",") if "@" not in found]
    assert len(selectors) > 20
    assert [selector for selector in selectors if not selector.startswith(".stagecut ")] == []
    assert css.count("{") == css.count("}")


def test_names_of_a_model_are_inert(hostile_plan):
    page = plan_html(hostile_plan)
    assert is_inert(page)
    assert "<script>alert(" in Reader(page).text


def test_a_picture_that_is_too_large_gives_way_to_the_cut_and_then_to_tables(plan, monkeypatch):
    whole = len(plan_html(plan).encode())
    monkeypatch.setattr(notebook_parts, "MOST_BYTES", whole - 1)
    without_step = plan_html(plan)
    assert "<svg" in without_step
    assert "simulated step:" not in without_step
    assert "the whole picture is too large for a notebook" in without_step
    monkeypatch.setattr(notebook_parts, "MOST_BYTES", 10)
    tables = plan_html(plan)
    assert "<svg" not in tables
    assert "the whole picture is too large for a notebook; plan.save(" in tables


def test_a_timeline_is_a_picture_with_its_workers(timeline):
    page = timeline_html(timeline)
    assert is_inert(page)
    text = Reader(page).text
    assert "simulated step: " in text
    for worker in range(timeline.n_workers):
        computes = share(timeline.busy_s(worker) / timeline.makespan_s)
        assert f"worker {worker}stage {worker}, {computes}" in text


def test_a_timeline_without_spans_says_so():
    assert "measured step: 0 ms" in timeline_html(Timeline("measured", 2, ()))


def test_a_timeline_with_very_many_spans_is_a_table(many_spans):
    page = timeline_html(many_spans)
    assert len(page.encode()) <= MOST_BYTES
    assert "<svg" not in page
    assert "<table>" in page


def test_a_pipeline_shows_its_plan_and_nothing_before_it_has_one(plan):
    assert pipeline_html(SimpleNamespace(plan=plan)) == plan_html(plan)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with stagecut.compile(model, ["cpu"], launch="inline") as pm:
        assert pipeline_html(pm) is None


class Gate(nn.Module):
    def forward(self, x):
        return -x if x.mean() > 0 else x


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_capture_is_its_graph_with_what_was_kept_whole():
    model = nn.Sequential(nn.Linear(4, 4), Gate(), nn.Linear(4, 4))
    model.add_module("<img src=x onerror=alert(1)>", nn.ReLU())
    capture = stagecut.capture(model, (torch.randn(4, 4),))
    page = capture_html(capture)
    reader = Reader(page)
    assert is_inert(page)
    assert "1 op kept whole, in orange" in reader.text
    assert "it branches on a tensor's data" in reader.text
    assert page.count('class="box c1"') == 1
    assert page == capture_html(capture)


def test_the_interactive_page_is_in_a_frame_that_reaches_nothing(hostile_plan):
    shown = interactive(hostile_plan)
    frame = shown._repr_html_()
    (source,) = re.findall(r'^<iframe sandbox="allow-scripts" srcdoc="([^"]*)"', frame)
    assert html.unescape(source) == shown.page
    assert "allow-same-origin" not in frame
    assert Reader(frame).tags == {"iframe"}
    assert Reader(frame).text == ""


def test_every_entry_point_is_a_class_and_what_draws_it(entry_points):
    assert set(entry_points) == {"Capture", "Pipeline", "Plan", "Timeline"}
    for kind, value in entry_points.items():
        assert callable(importlib.metadata.EntryPoint(kind, value, GROUP).load())
        assert hasattr(getattr(stagecut, kind), "_repr_html_")


def test_objects_are_drawn_where_the_package_is_installed(plan, timeline, installed, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(installed), *sys.path])
    assert plan._repr_html_() == plan_html(plan)
    assert timeline._repr_html_() == timeline_html(timeline)


def test_without_metadata_there_is_no_html(plan, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    assert plan._repr_html_() is None


def test_representations_cost_nothing_before_they_are_shown():
    code = "import sys, stagecut.partitioner.plan; print('stagecut.tools' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False False\n"


def test_a_cell_shows_a_plan_as_html(saved, installed, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")])))
    code = f"import stagecut\nstagecut.load({saved!r})"
    frame = f"from stagecut.tools.notebook import interactive\ninteractive(stagecut.load({saved!r}))"
    cells = [nbformat.v4.new_code_cell(cell) for cell in (code, frame)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown, framed = (cell.outputs[-1]["data"] for cell in notebook.cells)
    assert "<svg" in shown["text/html"]
    assert is_inert(shown["text/html"])
    assert len(shown["text/html"].encode()) <= MOST_BYTES
    assert shown["text/plain"]
    assert framed["text/html"].startswith('<iframe sandbox="allow-scripts" srcdoc="')
