import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from stagecut.runtime.program import Span, Timeline
from stagecut.tools.draw_timeline import draw_timelines
from stagecut.tools.style import STAGE_COLOURS, drawing_rules
from stagecut.tools.svg import graph_svg, plan_svg, timeline_svg
from stagecut.tools.words import size

SVG = "{http://www.w3.org/2000/svg}"


def elements(svg, tag, kind=None):
    found = ET.fromstring(svg).iter(f"{SVG}{tag}")
    return [e for e in found if kind is None or kind in e.get("class", "").split()]


def texts(svg):
    return [e.text for e in elements(svg, "text")]


def test_equal_plans_give_equal_bytes(plan, timeline):
    assert plan_svg(plan, timeline) == plan_svg(replace(plan), plan.predicted)


def test_the_picture_is_one_file_that_loads_nothing(plan, timeline):
    svg = plan_svg(plan, timeline)
    assert svg.count("http:") == svg.count('xmlns="http://www.w3.org/2000/svg"') == 1
    assert not re.search(r"https:|href|url\(|@import|<script|<image|<foreignObject", svg)


def test_each_stage_is_named_with_its_number_and_what_crosses_into_it(plan):
    written = texts(graph_svg(plan))
    for stage in plan.stages:
        assert f"stage {stage.index}" in written
        into = sum(wire.n_bytes for wire in plan.wires if stage.index in wire.targets)
        assert (f"▼ cut: {size(into)} cross" in written) == (into > 0)


def test_lines_that_cross_stages_are_thick_and_name_their_values(plan):
    tips = [e.find(f"{SVG}title").text for e in elements(graph_svg(plan), "path", "wire")]
    for wire in plan.wires:
        assert any(wire.value in tip and f"stage {wire.source} to {wire.targets[0]}" in tip for tip in tips)


def test_folding_is_said(plan):
    assert any("shown" in text or "folded at depth" in text for text in texts(graph_svg(plan)))


def test_every_compute_of_the_timeline_is_drawn_to_scale(plan, timeline):
    svg = timeline_svg(plan, timeline)
    for kind, op in (("fwd", "F"), ("bwd", "B")):
        drawn = [e for e in elements(svg, "rect", kind) if e.find(f"{SVG}title") is not None]
        spans = [span for span in timeline.spans if span.op == op]
        widths = sorted(float(e.get("width")) for e in drawn)
        seconds = sorted(span.end_s - span.start_s for span in spans)
        assert len(widths) == len(seconds)
        assert all(w / widths[-1] == pytest.approx(s / seconds[-1], abs=1e-3) for w, s in zip(widths, seconds))


def test_waiting_is_written_for_each_worker(plan, timeline):
    assert sum(1 for text in texts(timeline_svg(plan, timeline)) if re.fullmatch(r"waits \d+%", text)) == 3


def test_measured_and_simulated_share_one_axis(plan):
    one = Timeline("simulated", 3, (Span(0, "F", 0, 0, 0.0, 1.0),))
    other = Timeline("measured", 3, (Span(0, "F", 0, 0, 0.0, 4.0),))
    svg = timeline_svg(plan, one, other)
    short, long = (float(e.get("width")) for e in elements(svg, "rect", "fwd") if e.find(f"{SVG}title") is not None)
    assert long == pytest.approx(4 * short, abs=0.05)
    assert [text for text in texts(svg) if "step: " in text] == [
        "simulated step: 1.00 s, bubble 67%",
        "measured step: 4.00 s, bubble 67%",
    ]


def test_an_empty_timeline_is_drawn(plan):
    assert draw_timelines(plan, [Timeline("measured", 3, ())], 1000.0).height > 0


def test_names_from_the_model_are_inert(hostile_plan):
    svg = plan_svg(hostile_plan, hostile_plan.predicted)
    tags = {e.tag.removeprefix(SVG) for e in ET.fromstring(svg).iter()}
    assert tags == {"svg", "style", "g", "rect", "path", "text", "title"}
    assert "\x1b" not in svg


def test_replicas_are_lanes_of_one_stage(simulated_plan):
    svg = timeline_svg(simulated_plan, simulated_plan.predicted)
    assert {text for text in texts(svg) if text.startswith("worker ")} == {f"worker {w}" for w in range(4)}
    assert "2 x A100" in texts(graph_svg(simulated_plan))


def test_the_key_speaks_of_reductions_only_where_there_are_replicas(plan, simulated_plan):
    assert max(len(stage.devices) for stage in simulated_plan.stages) > 1
    words = "sums gradients of replicas"
    assert words in draw_timelines(simulated_plan, [simulated_plan.predicted], 1000.0).body
    assert words not in draw_timelines(plan, [plan.predicted], 1000.0).body


def test_colours_are_distinct_and_have_a_dark_sheet():
    assert len(set(STAGE_COLOURS)) == len(STAGE_COLOURS) == 8
    assert "prefers-color-scheme:dark" in drawing_rules()
