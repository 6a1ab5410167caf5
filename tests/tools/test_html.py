import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from stagecut.runtime.program import Timeline
from stagecut.tools.html import report_html

PAGE_TAGS = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "b", "div", "section"}
TAGS = PAGE_TAGS | {"table", "tr", "th", "td", "details", "summary", "ul", "li", "svg", "g", "rect", "path", "text"}


class Reader(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(plan, timeline):
    return report_html(plan, timeline)


def test_equal_plans_give_equal_bytes(plan, page):
    assert report_html(replace(plan), plan.predicted) == page


def test_nothing_is_loaded_and_nothing_runs(page):
    assert not re.search(r"https?:|//|src=|href=|url\(|@import|<script|style=|\bon\w+=", page)
    assert Reader(page).tags == TAGS


def test_the_policy_allows_the_style_sheet_of_the_page_and_nothing_else(page):
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [value for _, name, value in Reader(page).attributes if name == "content" and "default-src" in value]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_the_page_answers_where_how_much_who_waits_and_whether_it_fits(plan, page):
    text = " ".join(Reader(page).text)
    for part in ("3 stages", "limited by stage", "a microbatch", "waits longest", "fits", "one device"):
        assert part in text
    for wire in plan.wires:
        assert wire.value in text


def test_names_from_the_model_are_inert(hostile_plan):
    page = report_html(hostile_plan, hostile_plan.predicted)
    reader = Reader(page)
    assert reader.tags <= TAGS
    assert not [name for _, name, _ in reader.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert any("<img src=x onerror=alert(1)>" in text for text in reader.text)
    assert page.count("</style>") == 1
    assert "\x1b" not in page


def test_a_measured_timeline_stands_under_the_simulated_one(plan, timeline):
    spans = tuple(replace(s, start_s=2 * s.start_s, end_s=2 * s.end_s) for s in timeline.spans)
    slower = Timeline("measured", 3, spans)
    text = " ".join(Reader(report_html(plan, timeline, slower)).text)
    assert text.index("simulated step:") < text.index("measured step:")
    assert "+100% against the simulated one" in text


def test_the_page_does_not_tell_where_the_files_of_its_author_are(plan, page):
    assert any(op.source and "/" in op.source for op in plan.ops)
    assert "conftest.py" in page
    assert "tests/tools" not in page


def test_a_plan_of_one_stage_says_that_nothing_crosses(plan):
    ops = tuple(replace(op, stage=0) for op in plan.ops)
    alone = replace(plan, ops=ops, stages=plan.stages[:1], wires=())
    assert "nothing crosses between stages" in report_html(alone, alone.predicted)
