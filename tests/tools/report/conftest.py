"""Reports in a real browser: Debian's Chromium, driven by Playwright, with the network off."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stagecut.partitioner.measured_run import MeasuredRun, measured_run
from stagecut.partitioner.plan import LinkRecord, Plan
from stagecut.runtime.program import Timeline
from stagecut.tools.report import Shown, report_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def linked(plan: Plan) -> Plan:
    """The plan with links, whose speed the page can vary."""
    links = tuple(LinkRecord(s, t, 1e-5, 1e9) for s in range(3) for t in range(s + 1, 3))
    return replace(plan, timing=replace(plan.timing, links=links))


@pytest.fixture(scope="session")
def run(linked: Plan) -> MeasuredRun:
    """A step that took a tenth longer than it was predicted to."""
    predicted = linked.predicted
    spans = tuple(replace(s, start_s=1.1 * s.start_s, end_s=1.1 * s.end_s) for s in predicted.spans)
    timeline = Timeline("measured", predicted.n_workers, spans)
    return measured_run(linked, timeline, [timeline.makespan_s] * 3)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        # The sandbox wants privileges that containers lack; what is opened are our own files.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Open a report from disk with the network off; a message on the console or an error fails the test."""
    contexts, problems = [], []

    def open_report(*shown: Shown, hash: str = "", wait: bool = True, **options: Any) -> Any:
        path = tmp_path / f"report-{len(contexts)}.html"
        path.write_text(report_html(shown), encoding="utf-8")
        context = browser.new_context(offline=True, **{"viewport": {"width": 1440, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
        page.goto(f"{path.as_uri()}{hash}")
        if wait:
            page.wait_for_selector("#report header")
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert problems == []
