"""The report as a reader uses it, in a real browser."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Any

import pytest

import stagecut
from stagecut.partitioner.plan import OpRecord
from stagecut.partitioner.waiting import CAUSES, critical_path, waits
from stagecut.tools.notebook import interactive
from stagecut.tools.report import Shown, report_html
from stagecut.tools.words import size

VIEWS = ("overview", "graph", "stages", "timeline", "memory", "whatif")


def text(page: Any, selector: str) -> str:
    return str(page.locator(selector).first.text_content())


def state(page: Any) -> dict[str, Any]:
    return dict(page.evaluate("() => window.stagecut.state"))


def marked(page: Any, selector: str) -> int:
    return int(page.locator(f"{selector}.chosen").count())


def click(page: Any, selector: str) -> None:
    """Choose an element of a picture, which other elements may lie over."""
    page.locator(selector).first.dispatch_event("click")


def test_every_view_shows_something(opened, linked, run):
    page = opened(Shown("first", linked, run), Shown("second", replace(linked, schedule="fill-drain")))
    for view in (*VIEWS, "compare"):
        section = page.locator(f"section#{view}")
        assert section.locator("svg, table, .card").count() > 0, view
        assert section.bounding_box()["height"] > 40, view


def test_the_first_screen_says_where_it_is_cut_how_much_crosses_who_waits_and_whether_it_fits(opened, linked):
    page = opened(Shown("plan", linked))
    cards = text(page, ".cards")
    for wanted in ("3 stages", "proven", "Crosses", "forward and", "waits longest", "until another stage", "fits"):
        assert wanted in cards
    lanes = page.locator("#graph g.lane")
    assert lanes.count() == 3
    assert lanes.last.bounding_box()["y"] < 900
    assert page.locator("#graph g.wire").count() >= len(linked.wires)
    assert any(max(wire.targets) > wire.source + 1 for wire in linked.wires)
    assert "× 4 (skips)" in text(page, "#graph svg")


def test_a_value_with_two_users_in_the_next_stage_crosses_to_both_and_is_counted_once(opened, linked):
    first = max((op for op in linked.ops if op.stage == 0), key=lambda op: linked.ops.index(op))
    second = [op for op in linked.ops if op.stage == 1]
    assert any(first.name in op.inputs for op in second[:1])
    ops = tuple(replace(op, inputs=(*op.inputs, first.name)) if op is second[-1] else op for op in linked.ops)
    page = opened(Shown("plan", replace(linked, ops=ops)))
    assert page.locator("#graph g.wire[data-from='0'][data-to='1']").count() == 2
    (wire,) = [wire for wire in linked.wires if wire.value == first.name]
    tags = page.locator("#graph g.tag[data-stage='1']").all_text_contents()
    assert len(tags) == 1
    assert f"{wire.n_bytes} B × 4" in tags[0]


def test_choosing_a_stage_marks_it_in_every_view(opened, linked):
    page = opened(Shown("plan", linked))
    click(page, "#graph g.lane[data-stage='1']")
    for selector in ("#graph g.lane", "#stages tr", "#timeline g.span", "#memory section", "#graph g.wire"):
        assert marked(page, selector) > 0, selector
    assert marked(page, "#graph g.lane") == 1
    assert marked(page, "#timeline g.span") == 2 * 4  # forward and backward of four microbatches
    assert "stage 1" in text(page, "aside.details")
    click(page, "#stages tr[data-stage='2']")
    assert page.locator("#graph g.lane.chosen").get_attribute("data-stage") == "2"
    page.keyboard.press("Escape")
    assert marked(page, "#graph g.lane") == 0
    assert page.locator("aside.details").count() == 0


def test_what_is_chosen_is_in_the_address(opened, linked):
    page = opened(Shown("plan", linked))
    click(page, "#graph g.lane[data-stage='1']")
    page.keyboard.press("+")
    page.keyboard.press("d")
    seen = state(page)
    address = page.url
    again = opened(Shown("plan", linked), hash=address[address.index("#") :])
    assert state(again) == seen
    assert marked(again, "#graph g.lane") == 1
    page.evaluate("location.hash = '#stage=2'")
    page.wait_for_function("window.stagecut.state.stage === 2")
    assert page.locator("#graph g.lane.chosen").get_attribute("data-stage") == "2"


@pytest.mark.parametrize(
    "hash", ["#stage=99&op=9999&node=12345&plan=7&view=nowhere&t=3-1", "#toggled=999999", "#stage=<img src=x>&t=a-b"]
)
def test_an_address_of_another_report_chooses_nothing(opened, linked, hash):
    page = opened(Shown("plan", linked), hash=hash)
    now = state(page)
    assert (now["stage"], now["op"], now["node"], now["plan"], now["view"]) == (None, None, None, 0, "overview")
    assert (now["from"], now["to"]) == (0, 1)


def test_keys_go_through_stages_views_and_boxes(opened, linked):
    page = opened(Shown("plan", linked))
    for wanted in (0, 1, 2, 0):
        page.keyboard.press("n")
        assert state(page)["stage"] == wanted
    page.keyboard.press("p")
    assert state(page)["stage"] == 2
    for index, view in enumerate(VIEWS):
        page.keyboard.press(str(index + 1))
        assert state(page)["view"] == view
    page.keyboard.press("?")
    assert "unfold" in text(page, "dialog")
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    page.locator("#graph g.box").first.focus()
    page.keyboard.press("Enter")
    assert state(page)["op"] is not None or state(page)["node"] is not None
    page.keyboard.press("f")
    assert state(page)["node"] is not None
    folded = page.locator("#graph g.box").count()
    page.keyboard.press("u")
    assert page.locator("#graph g.box").count() > folded


def test_the_search_unfolds_what_it_finds(opened, linked):
    page = opened(Shown("plan", linked))
    page.get_by_role("button", name="fold all").click()
    assert page.locator("#graph g.box").count() == 3
    page.keyboard.press("/")
    page.keyboard.type("middle.2")
    page.keyboard.press("Enter")
    (found,) = [op for op in linked.ops if op.module_path == "middle.2"]
    assert state(page)["op"] == linked.ops.index(found)
    details = text(page, "aside.details")
    assert found.name in details
    assert re.search(r"conftest\.py:\d+", details) or found.source is None
    page.locator("#search").fill("nothing is called like this")
    page.locator("#search").press("Enter")
    assert "no op or module" in text(page, "#status")


def test_light_and_dark_follow_the_system_and_the_button(opened, linked):
    paper = "() => getComputedStyle(document.body).backgroundColor"
    dark = opened(Shown("plan", linked), color_scheme="dark")
    light = opened(Shown("plan", linked), color_scheme="light")
    assert dark.evaluate(paper) == "rgb(18, 22, 28)"
    assert light.evaluate(paper) == "rgb(255, 255, 255)"
    light.get_by_role("button", name="light / dark").click()
    assert light.evaluate(paper) == dark.evaluate(paper)
    assert "theme=dark" in light.url


def test_on_paper_there_are_no_controls(opened, linked):
    page = opened(Shown("plan", linked))
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.locator("#graph svg").first.is_visible()


def test_on_a_telephone_nothing_is_cut_off(opened, linked, run):
    page = opened(Shown("plan", linked, run), viewport={"width": 390, "height": 844})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_without_scripts_there_are_pictures_and_tables(opened, linked):
    page = opened(Shown("plan", linked), wait=False, java_script_enabled=False)
    assert page.locator("svg").count() >= 2
    assert page.locator("table").count() >= 3
    assert "waits longest" in page.locator("main").first.inner_text()


def test_it_runs_in_the_sandboxed_frame_of_a_notebook(browser, linked):
    context = browser.new_context(offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.set_content(interactive(linked)._repr_html_())
    inside = page.frame_locator("iframe")
    inside.locator("#report header").wait_for()
    inside.locator("#graph g.lane[data-stage='1']").dispatch_event("click")
    assert inside.locator("#graph g.lane.chosen").count() == 1
    assert problems == []
    context.close()


def test_names_from_the_model_are_text(opened, hostile_plan):
    page = opened(Shown("<img src=x onerror=alert(3)>", hostile_plan))
    assert page.locator("img").count() == 0
    assert "<img src=x onerror=alert(1)>" in page.content().replace("&lt;", "<").replace("&gt;", ">")
    page.keyboard.press("n")
    page.locator("#graph g.box").first.dispatch_event("click")
    assert page.locator("img").count() == 0


def test_a_graph_of_many_ops_is_folded_and_says_what_is_hidden(opened, linked):
    page = opened(Shown("deep", deep(linked, 450)))
    assert page.locator("#graph g.box").count() <= 400
    assert re.search(r"of 450 ops are drawn alone; \d+ are hidden in \d+ folded box", text(page, "#graph .note"))
    while page.locator("#status").inner_text() == "":
        click(page, "#graph g.box:not([data-tried]) g.open")
        assert page.locator("#graph g.box, #graph g.input").count() <= 400
    assert "are the most: fold something first" in text(page, "#status")


def test_modules_whose_ops_alternate_are_folded_until_few_enough_boxes_are_left(opened, linked):
    plan = deep(linked, 2000)
    paths = ["left", "right"]
    crossed = tuple(replace(op, module_path=f"{paths[i % 2]}.{i % 7}.{i % 5}") for i, op in enumerate(plan.ops))
    page = opened(Shown("crossed", replace(plan, ops=crossed)))
    assert 3 <= page.locator("#graph g.box").count() <= 400
    everything = ".".join(str(node) for node in range(len(page.evaluate("() => stagecut.plans()[0].graph.nodes"))))
    again = opened(Shown("crossed", replace(plan, ops=crossed)), hash=f"#toggled={everything}")
    assert 3 <= again.locator("#graph g.box").count() <= 400


def test_like_modules_that_follow_each_other_are_one_box(opened, linked):
    page = opened(Shown("deep", deep(linked, 1500)))
    assert page.locator("#graph g.box.run").count() > 0
    assert "×" in text(page, "#graph g.box.run")


def deep(plan: Any, n_ops: int) -> Any:
    """Put a chain of like layers of five ops each in the place of the plan's ops."""
    ops: list[OpRecord] = []
    for index in range(n_ops):
        layer, stage = index // 5, index * len(plan.stages) // n_ops
        inputs = (ops[-1].name,) if ops else (plan.graph_inputs[0],)
        path = f"layers.{layer}.part.{index % 5}"
        ops.append(
            OpRecord(f"op_{index}", "torch.relu", path, "deep.py:3", stage, inputs, 1e-4, 2e-4, 64, 64, "analytic")
        )
    first = {stage: [op.name for op in ops if op.stage == stage][-1] for stage in range(len(plan.stages) - 1)}
    wires = tuple(replace(plan.wires[0], value=name, source=s, targets=(s + 1,)) for s, name in first.items())
    return replace(plan, ops=tuple(ops), wires=wires)


def test_moving_an_op_costs_what_a_plan_with_it_moved_would(opened, linked):
    page = opened(Shown("plan", linked))
    checked = 0
    for index, op in enumerate(linked.ops):
        for to in (op.stage - 1, op.stage + 1):
            if not 0 <= to < len(linked.stages):
                continue
            cost = page.evaluate(
                "([op, to]) => window.stagecut.moved(window.stagecut.plans()[0], [op], to)", [index, to]
            )
            stage_of = {**linked.stage_of, op.name: to}
            legal = all(stage_of[name] <= stage_of[o.name] for o in linked.ops for name in o.inputs if name in stage_of)
            assert ("because" not in cost) == legal
            if legal:
                checked += 1
                assert cost["bytes"] == crossing(linked, stage_of) - crossing(linked, linked.stage_of)
                assert cost["then"] == pytest.approx(slowest(linked, stage_of), rel=1e-4)
    assert checked > 2


def crossing(plan: Any, stage_of: dict[str, int]) -> int:
    """Count the bytes of a microbatch that cross, every value once for each other stage that uses it."""
    sizes = {op.name: op.output_bytes for op in plan.ops} | {wire.value: wire.n_bytes for wire in plan.wires}
    pairs = {(name, stage_of[op.name]) for op in plan.ops for name in op.inputs if name in stage_of}
    return sum(sizes[name] for name, stage in pairs if stage != stage_of[name])


def slowest(plan: Any, stage_of: dict[str, int]) -> float:
    loads = [stage.forward_s + stage.backward_s for stage in plan.stages]
    for op in plan.ops:
        loads[op.stage] -= op.forward_s + op.backward_s
        loads[stage_of[op.name]] += op.forward_s + op.backward_s
    return max(loads)


def test_the_timeline_says_why_workers_wait_and_what_is_critical(opened, linked):
    page = opened(Shown("plan", linked))
    timeline = linked.predicted
    found = waits(linked, timeline)
    shown = page.locator("#timeline g[data-cause]").evaluate_all("all => all.map(each => each.dataset.cause)")
    assert set(shown) <= set(CAUSES)
    assert set(shown) == {wait.cause for wait in found if wait.end_s - wait.start_s > timeline.makespan_s * 2e-3}
    computed = [i for i in critical_path(linked, timeline) if timeline.spans[i].op in ("F", "B")]
    assert page.locator("#timeline g.span.critical").count() == len(computed)
    tips = page.locator("#timeline g[data-cause] title").all_text_contents()
    assert any(
        re.fullmatch(r"waits \S+ ms until another stage has computed: \w+ of microbatch \d in stage \d", t)
        for t in tips
    )


def test_the_measured_step_stands_under_the_predicted_one_on_the_same_axis(opened, linked, run):
    page = opened(Shown("plan", linked, run))
    titles = page.locator("#timeline svg text.h").all_text_contents()
    assert [title.split()[0] for title in titles] == ["simulated", "measured"]
    lanes = page.locator("#timeline rect.idle").evaluate_all(
        "all => all.map(each => each.getBoundingClientRect().width)"
    )
    assert lanes[3] / lanes[0] == pytest.approx(1.1, rel=0.01)
    assert "+10.0% against the simulated step" in text(page, ".cards")


def test_a_part_of_the_step_can_be_looked_at(opened, linked):
    page = opened(Shown("plan", linked))
    whole = page.locator("#timeline g.span").count()
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert page.locator("#timeline g.span").count() < whole
    assert "of the step is shown" in text(page, "#timeline .bar")
    before = state(page)["from"]
    page.keyboard.press("ArrowRight")
    assert state(page)["from"] > before
    page.get_by_role("button", name="whole step").click()
    assert page.locator("#timeline g.span").count() == whole


def test_memory_names_who_is_alive_at_the_peak(opened, linked):
    page = opened(Shown("plan", linked))
    charts = page.locator("#memory section.chart")
    assert charts.count() == 3
    for worker, chart in enumerate(charts.all()):
        assert f"worker {worker} (stage {worker})" in chart.inner_text()
        chart.locator("summary").click()
        assert f"weights, gradients and optimizer state of stage {worker}" in chart.inner_text()
        assert "activations of microbatches 0" in chart.inner_text()


def test_candidates_are_filtered_and_given_as_calls_of_compile(opened, linked):
    page = opened(Shown("plan", linked))
    rows = page.locator("#whatif tbody tr")
    assert rows.count() == 1 + len(linked.alternatives)
    calls = page.locator("#whatif button[data-call]").evaluate_all("all => all.map(each => each.dataset.call)")
    known = inspect.signature(stagecut.compile).parameters
    calls.remove("stagecut.compile(model, devices, plan='plan.json')")
    for call in calls:
        given = eval(call, {"stagecut": Recorder, "model": None, "devices": ["cpu"] * 3})  # our own words
        assert set(given) <= set(known)
        assert given["stages"] >= 1
    schedules = sorted({other.schedule for other in linked.alternatives})
    page.locator("#whatif select").nth(1).select_option(schedules[0])
    wanted = [other for other in linked.alternatives if other.schedule == schedules[0]]
    assert rows.count() == 1 + len(wanted)
    assert page.locator("#whatif circle").count() >= 7  # one for each speed of the links


class Recorder:
    @staticmethod
    def compile(model: Any, devices: Any, **given: Any) -> dict[str, Any]:
        return given


def test_plans_are_compared_and_chosen_between(opened, linked):
    other = replace(linked, schedule="fill-drain", orders=())
    page = opened(Shown("before.json", linked), Shown("after.json", other))
    assert "the same cut" in text(page, "#compare")
    assert "fill-drain" in text(page, "#compare table")
    page.locator("select#plan").select_option("1")
    assert "fill-drain" in text(page, "h1")
    assert "plan=1" in page.url


def test_an_address_with_a_view_that_is_not_there_leaves_the_keys_working(opened, linked):
    page = opened(Shown("plan", linked), hash="#view=compare")
    page.keyboard.press("n")
    assert state(page)["stage"] == 0


def test_a_stage_of_another_plan_is_chosen_in_that_plan(opened, linked):
    ops = tuple(replace(op, stage=min(op.stage, 1)) for op in linked.ops)
    wires = tuple(wire for wire in linked.wires if wire.source == 0)
    wires = tuple(replace(wire, targets=(1,)) for wire in wires)
    two = replace(linked, ops=ops, stages=linked.stages[:2], wires=wires)
    page = opened(Shown("two", two), Shown("three", linked))
    lanes = page.locator("#compare g[data-key='lane 1 simulated 2']")
    lanes.dispatch_event("click")
    assert (state(page)["plan"], state(page)["stage"]) == (1, 2)
    assert page.locator("#graph g.lane.chosen").get_attribute("data-stage") == "2"


def test_enter_goes_on_to_the_next_that_was_found(opened, linked):
    page = opened(Shown("plan", linked))
    page.keyboard.press("/")
    page.keyboard.type("middle")
    found = []
    for _ in range(3):
        page.keyboard.press("Enter")
        found.append(state(page)["op"])
    wanted = [index for index, op in enumerate(linked.ops) if "middle" in op.module_path]
    assert found == wanted[:3]
    assert 'with "middle"; enter again' in text(page, "#status")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert text(page, "#status") == ""


def test_folding_undoes_unfolding(opened, linked):
    page = opened(Shown("deep", deep(linked, 300)))
    before = page.locator("#graph g.box").count()
    page.locator("#graph g.box.run").first.dispatch_event("click")
    page.keyboard.press("u")
    assert page.locator("#graph g.box").count() > before
    page.keyboard.press("f")
    assert page.locator("#graph g.box").count() == before


def test_a_filter_does_not_outlive_its_plan(opened, linked):
    other = replace(linked, alternatives=linked.alternatives[:1])
    page = opened(Shown("many", linked), Shown("few", other))
    page.locator("#whatif select").nth(1).select_option(linked.alternatives[-1].schedule)
    page.locator("select#plan").select_option("1")
    assert page.locator("#whatif tbody tr").count() == 2


def test_a_drag_that_the_browser_takes_over_does_not_zoom_later(opened, linked):
    page = opened(Shown("plan", linked))
    page.locator("#timeline .wide svg").scroll_into_view_if_needed()
    events = """(svg, kinds) => {
        const box = svg.getBoundingClientRect();
        const at = (kind, x) => new PointerEvent(kind, {pointerId: 7, button: 0, bubbles: true, clientX: box.left + x});
        svg.dispatchEvent(at("pointerdown", 300));
        for (const kind of kinds) window.dispatchEvent(at(kind, 700));
    }"""
    svg = page.locator("#timeline .wide svg").first
    svg.evaluate(events, ["pointercancel", "pointerup"])
    assert (state(page)["from"], state(page)["to"]) == (0, 1)
    svg.evaluate(events, ["pointerup"])
    assert 0 < state(page)["from"] < state(page)["to"] < 1


def test_a_browser_that_cannot_draw_it_says_so(opened, browser, linked, tmp_path):
    (tmp_path / "old.html").write_text(report_html([Shown("plan", linked)]), encoding="utf-8")
    context = browser.new_context(offline=True)
    context.add_init_script("delete window.DecompressionStream")
    page = context.new_page()
    page.goto((tmp_path / "old.html").as_uri())
    page.locator("#report").wait_for()
    assert "It needs a browser of 2023 or later" in text(page, "#report")
    context.close()


def test_what_crosses_in_a_step_counts_the_microbatches_of_all_replicas(opened, simulated_plan):
    page = opened(Shown("plan", simulated_plan))
    assert (simulated_plan.n_microbatches, simulated_plan.layout().n_replicas, simulated_plan.batch_rows) == (4, 2, 8)
    (crossing,) = [
        row for row in page.locator("#stages table").all() if "from" in row.locator("th").all_text_contents()
    ]
    headings = crossing.locator("th").all_text_contents()
    assert headings == ["value", "module", "from", "to", "bytes", "× 8", "gradient comes back"]
    cells = crossing.locator("tbody tr >> nth=0").locator("td").all_text_contents()
    largest = max(simulated_plan.wires, key=lambda wire: wire.n_bytes * len(wire.targets))
    assert cells[4:6] == [size(largest.n_bytes), size(8 * largest.n_bytes)]
    assert "4 microbatches a replica" in text(page, "h1")


def test_a_value_that_is_made_again_does_not_cross(opened, linked):
    (wire,) = [wire for wire in linked.wires if max(wire.targets) > wire.source + 1]
    far = max(wire.targets)
    left = tuple(target for target in wire.targets if target != far)
    ops = tuple(replace(op, copies=(far,)) if op.name == wire.value else op for op in linked.ops)
    wires = tuple(replace(w, targets=left) if w is wire else w for w in linked.wires)
    page = opened(Shown("copies", replace(linked, ops=ops, wires=wires)))
    assert "(skips)" not in text(page, "#graph svg")
    assert f"made again in stage {far}" in text(page, "#graph svg")


def test_moving_ops_counts_the_second_forward_of_a_stage_that_recomputes(opened, linked):
    stages = tuple(replace(stage, recompute=True) for stage in linked.stages)
    again = replace(linked, stages=stages)
    page = opened(Shown("plan", again))
    index = max(i for i, op in enumerate(linked.ops) if op.stage == 0)
    cost = page.evaluate("(op) => window.stagecut.moved(window.stagecut.plans()[0], [op], 1)", index)
    op = linked.ops[index]
    assert cost["after"][1] - cost["loads"][1] == pytest.approx(2 * op.forward_s + op.backward_s, rel=1e-4)
