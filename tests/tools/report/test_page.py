"""The page as text: what it may load and run, what it shows without scripts, and its size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from stagecut.errors import StagecutError
from stagecut.tools.report import Shown, report_html

PAGE_TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "noscript",
    "main",
    "h1",
    "h2",
    "p",
    "b",
    "div",
    "script",
}
TAGS = PAGE_TAGS | {"section", "table", "tr", "th", "td", "details", "summary", "ul", "li", "svg", "g", "rect"}
TAGS |= {"path", "text"}


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def data_of(page: str) -> dict[str, Any]:
    (packed,) = re.findall(r'<script type="application/octet-stream" id="data">([^<]*)</script>', page)
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def without_data(page: str) -> str:
    return re.sub(r'(id="data">)[^<]*', r"\1", page)


@pytest.fixture(scope="module")
def page(plan):
    return report_html([Shown("plan", plan)])


def test_equal_plans_give_equal_bytes(plan, page):
    assert report_html([Shown("plan", replace(plan))]) == page


def test_nothing_is_loaded(page):
    text = without_data(page)
    text = text.replace('"http://www.w3.org/2000/svg"', "")  # the name of SVG, which browsers do not load
    assert not re.search(
        r"https?:|src=|url\(|@import|import\(|fetch\(|XMLHttpRequest|WebSocket|innerHTML|\beval\(", text
    )
    assert not [value for tag, name, value in Reader(page).attributes if name in ("src", "href", "style", "srcset")]
    assert not [name for _, name, _ in Reader(page).attributes if name.startswith("on")]
    assert Reader(page).tags <= TAGS


def test_the_policy_allows_the_style_and_the_script_of_the_page_and_nothing_else(page):
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (policy,) = [value for _, name, value in Reader(page).attributes if name == "content" and "default-src" in value]

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    parts = ["default-src 'none'", f"script-src {digest(script)}", f"style-src {digest(style)}"]
    assert policy == "; ".join([*parts, "base-uri 'none'", "form-action 'none'"])
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_the_code_of_the_page_is_small(page):
    code = sum(map(len, re.findall(r"<(?:style|script)>.*?</(?:style|script)>", page, re.DOTALL)))
    assert 20_000 < code < 250_000


def test_without_scripts_it_answers_where_how_much_who_waits_and_whether_it_fits(plan, page):
    (body,) = re.findall(r"<noscript>(.*?)</noscript>", page, re.DOTALL)
    text = " ".join(Reader(body).text)
    for part in ("3 stages", "limited by stage", "a microbatch", "waits longest", "fits", "one device"):
        assert part in text
    for wire in plan.wires:
        assert wire.value in text
    assert "<svg" in body


def test_names_from_the_model_are_inert(hostile_plan):
    page = report_html([Shown("</script><script>alert(2)</script>.json", hostile_plan)])
    reader = Reader(page)
    assert reader.tags <= TAGS
    assert not [name for _, name, _ in reader.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert any("<img src=x onerror=alert(1)>" in text for text in reader.text)
    assert page.count("</style>") == 1
    assert page.count("</script>") == 2
    assert "\x1b" not in page


def test_the_data_says_what_the_plan_does(plan, page):
    (shown,) = data_of(page)["plans"]
    graph = shown["graph"]
    assert graph["names"] == [op.name for op in plan.ops]
    assert graph["stages"] == [op.stage for op in plan.ops]
    assert [(wire[1], wire[2], tuple(wire[3]), wire[5]) for wire in shown["wires"]] == [
        (wire.value, wire.source, wire.targets, wire.n_bytes) for wire in plan.wires
    ]
    assert shown["timelines"][0]["makespan_s"] == plan.predicted.makespan_s


def test_the_page_does_not_tell_where_the_files_of_its_author_are(plan, page):
    assert any(op.source and "/" in op.source for op in plan.ops)
    assert any(text.startswith("conftest.py:") for text in data_of(page)["plans"][0]["graph"]["texts"])
    assert "tests/tools" not in page
    assert "tests/tools" not in json.dumps(data_of(page))


def test_a_plan_of_one_stage_says_that_nothing_crosses(plan):
    ops = tuple(replace(op, stage=0) for op in plan.ops)
    alone = replace(plan, ops=ops, stages=plan.stages[:1], wires=())
    assert "nothing crosses between stages" in report_html([Shown("alone", alone)])


def test_no_plan_is_no_report():
    with pytest.raises(StagecutError, match="one plan or more"):
        report_html([])
