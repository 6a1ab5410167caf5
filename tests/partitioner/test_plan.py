"""Plans as files: both ways through JSON, and what is refused, with the place in the file."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from stagecut.errors import PlanError
from stagecut.partitioner.plan import (
    FORMAT,
    Alternative,
    OpRecord,
    Plan,
    Prediction,
    StageRecord,
    TieRecord,
    WireRecord,
    load,
    parse,
)
from stagecut.records import to_json
from stagecut.runtime.instructions import Layout
from stagecut.runtime.program import check, lower
from stagecut.runtime.schedules import schedule

property_test = settings(max_examples=400, deadline=None, derandomize=True)


def op(name: str, stage: int, *inputs: str) -> OpRecord:
    return OpRecord(name, "torch.relu", "body.0", "model.py:3", stage, inputs, 1e-3, 2e-3, 4096, 8192, "measured")


def stage(index: int, first: int, *devices: str) -> StageRecord:
    workers = tuple(range(first, first + len(devices)))
    return StageRecord(index, devices, workers, 0.25, 0.5, 3 << 20, 8192, 2, 5 << 30, 2.0**62)


def make_plan() -> Plan:
    """Three stages, the middle one replicated, a skip over it, a gradient on one wire only."""
    return Plan(
        format=FORMAT,
        model="Net",
        fingerprint="0123456789abcdef",
        batch_rows=64,
        n_microbatches=4,
        schedule="1f1b",
        graph_inputs=("x", "mask"),
        ops=(op("a", 0, "x"), op("b", 1, "a", "mask"), op("c", 2, "b", "a", "x")),
        stages=(stage(0, 0, "cpu"), stage(1, 1, "cpu", "cuda:1"), stage(2, 3, "cpu")),
        wires=(WireRecord("a", 0, (1, 2), 2048, True), WireRecord("b", 1, (2,), 1024, False)),
        prediction=Prediction(0.0125, 0.25, 0.75, 0.7, False, 0.03, "measured"),
        alternatives=(Alternative("fill-drain", 8, 0.02, 2),),
        ties=(TieRecord("body.weight", ("a", "c"), 4096),),
    )


def as_json() -> dict[str, Any]:
    return json.loads(json.dumps(to_json(make_plan())))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, the value itself first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


PLACES = list(places(as_json()))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def changed(path: tuple[Any, ...], new: Any) -> dict[str, Any]:
    value = as_json()
    at(value, path[:-1])[path[-1]] = new
    return value


def without(path: tuple[Any, ...]) -> dict[str, Any]:
    value = as_json()
    del at(value, path[:-1])[path[-1]]
    return value


def test_a_plan_comes_back_equal_from_its_file(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    assert load(tmp_path / "plan.json") == plan
    assert load(str(tmp_path / "plan.json")) == plan


def test_the_layout_numbers_workers_stage_by_stage_and_keeps_gradient_wires_apart() -> None:
    assert make_plan().layout() == Layout(((0,), (1, 2), (3,)), ((0, 1), (0, 2), (1, 2)), ((0, 1), (0, 2)))
    assert make_plan().devices == ("cpu", "cpu", "cuda:1", "cpu")
    assert make_plan().stage_of == {"a": 0, "b": 1, "c": 2}


def test_a_worker_holds_weights_gradients_activations_recordings_and_scratch() -> None:
    plan, mib = make_plan(), 1 << 20
    alone = 2 * 3 * mib + int(1.12 * 2 * 8192) + 48 * 1024 + 16 * mib
    replica = alone + 3 * mib // 2  # the half of the other's gradients that it sums
    assert plan.worker_bytes == (alone, replica, replica, alone)

    copied = replace(plan, ops=(replace(plan.ops[0], copies=(2,)), *plan.ops[1:]))
    assert copied.worker_bytes == (alone, replica, replica, alone + 48 * 1024)


def test_a_worker_of_several_stages_holds_what_they_hold_at_once() -> None:
    plan, state, held, at_once = make_plan(), 12 << 20, 2 * 8192, 40_000
    stages = tuple(
        replace(own, workers=workers, memory_bytes=state + held, beside_bytes=beside)
        for own, workers, beside in zip(plan.stages, ((0,), (1, 2), (0,)), (state + at_once - held, 0) * 2)
    )
    expected = 2 * (6 << 20) + int(1.12 * at_once) + 2 * 48 * 1024 + (16 << 20)
    assert replace(plan, stages=stages).worker_bytes[0] == expected


def test_a_plan_prints_its_decision_and_prediction() -> None:
    lines = str(make_plan()).splitlines()
    assert lines[0].startswith(
        "Net: 3 stages, 1f1b, 64 rows in 4 microbatches a replica, predicted step 12.5 ms (measured)"
    )
    assert "bubble 25%" in lines[0]
    assert "proven bound 700 ms" in lines[0]
    assert lines[3].split() == ["1", "cpu,cuda:1", "1", "250", "ms", "500", "ms", "3", "MiB", "5", "GiB"]
    assert lines[5:] == [
        "  a: stage 0 -> 1, 2, 2 KiB a microbatch",
        "  b: stage 1 -> 2, 1 KiB a microbatch",
    ]


REFUSALS: dict[str, tuple[Any, str, str]] = {
    "no object": ([1], "$", "expected an object"),
    "unknown key": (changed(("stages", 1, "color"), "red"), "$.stages[1].color", "unknown key"),
    "missing key": (without(("ops", 2, "target")), "$.ops[2].target", "missing key"),
    "text for a number": (changed(("batch_rows",), "64"), "$.batch_rows", "expected an integer"),
    "true for an integer": (changed(("ops", 0, "stage"), False), "$.ops[0].stage", "expected an integer, got bool"),
    "true for a number": (changed(("ops", 0, "forward_s"), True), "$.ops[0].forward_s", "expected a number, got bool"),
    "integer for true": (changed(("wires", 0, "gradient"), 1), "$.wires[0].gradient", "expected true or false"),
    "seconds of a stage missing": (changed(("timing", "store_s"), [0.1, 0.2]), "$.timing.store_s", "3 entries or none"),
    "seconds of no stage": (
        changed(("timing", "reduce_s"), [0.0] * 4),
        "$.timing.reduce_s",
        "3 entries or none, got 4",
    ),
    "a worker nowhere": (changed(("timing", "hosts"), [0, 0, 0]), "$.timing.hosts", "4 entries or none, got 3"),
    "fraction": (changed(("n_microbatches",), 4.0), "$.n_microbatches", "expected an integer"),
    "NaN": (changed(("prediction", "step_s"), float("nan")), "$.prediction.step_s", "expected a finite number"),
    "null": (changed(("model",), None), "$.model", "expected a string"),
    "object for array": (changed(("ops",), {}), "$.ops", "expected an array"),
    "older format": (changed(("format",), 0), "$.format", f"reads format {FORMAT}, got 0"),
    "no format": (without(("format",)), "$.format", "got None"),
    "format in words": (changed(("format",), "one"), "$.format", "got 'one'"),
    "format is true": (changed(("format",), True), "$.format", f"reads format {FORMAT}, got True"),
    "no stages": (changed(("stages",), []), "$.stages", "at least one stage"),
    "gap in stages": (changed(("stages", 1, "index"), 2), "$.stages[1].index", "expected 1, got 2"),
    "no device": (changed(("stages", 2, "devices"), []), "$.stages[2].devices", "at least one device"),
    "no microbatch": (changed(("n_microbatches",), 0), "$.n_microbatches", "at least 1"),
    "no rows": (changed(("batch_rows",), 0), "$.batch_rows", "at least 1"),
    "unknown schedule": (changed(("schedule",), "gpipe"), "$.schedule", "unknown schedule 'gpipe'; known: 1f1b"),
    "schedule that does not train": (changed(("schedule",), "forward-only"), "$.schedule", "unknown schedule"),
    "cycle of ops": (changed(("ops", 0, "inputs"), ["c"]), "$.ops[0].inputs[0]", "cycle or are out of order"),
    "op uses itself": (changed(("ops", 0, "inputs"), ["a"]), "$.ops[0].inputs[0]", "cycle or are out of order"),
    "unknown value": (changed(("ops", 1, "inputs", 1), "y"), "$.ops[1].inputs[1]", "does not exist"),
    "op stands twice": (changed(("ops", 1, "name"), "a"), "$.ops[1].name", "'a' stands twice"),
    "op is called like an input": (changed(("ops", 1, "name"), "x"), "$.ops[1].name", "'x' stands twice"),
    "op beyond the stages": (changed(("ops", 1, "stage"), 3), "$.ops[1].stage", "there are 3 stages"),
    "op before the stages": (changed(("ops", 1, "stage"), -1), "$.ops[1].stage", "there are 3 stages"),
    "value flows backwards": (changed(("ops", 0, "stage"), 2), "$.ops[1].stage", "stages must be convex"),
    "wire of no op": (changed(("wires", 0, "value"), "z"), "$.wires[0].value", "no op is called 'z'"),
    "wire of an input": (changed(("wires", 0, "value"), "x"), "$.wires[0].value", "no op is called 'x'"),
    "wire from another stage": (changed(("wires", 1, "source"), 0), "$.wires[1].source", "made on stage 1, not 0"),
    "wire to an earlier stage": (changed(("wires", 1, "targets"), [2, 0]), "$.wires[1].targets[1]", "cannot cross"),
    "wire to its own stage": (changed(("wires", 1, "targets"), [1]), "$.wires[1].targets[0]", "cannot cross"),
    "wire to no stage": (changed(("wires", 1, "targets"), [3]), "$.wires[1].targets[0]", "do not exist"),
    "missing wire": (changed(("wires", 0, "targets"), [1]), "$.wires", "'a' is used by $.ops[2] on stage 2"),
    "tie of no op": (changed(("ties", 0, "ops"), ["a", "z"]), "$.ties[0].ops", "there is no op 'z'"),
    "tie in one stage": (changed(("ties", 0, "ops"), ["a"]), "$.ties[0].ops", "ops of several stages, got a"),
    "tie of less than nothing": (changed(("ties", 0, "n_bytes"), -1), "$.ties[0].n_bytes", "at least 0"),
    "less than no time": (changed(("ops", 1, "forward_s"), -1e-3), "$.ops[1].forward_s", "at least 0, got -0.001"),
    "less than no bytes": (changed(("stages", 2, "saved_bytes"), -1), "$.stages[2].saved_bytes", "at least 0"),
    "step before it begins": (changed(("prediction", "step_s"), -0.5), "$.prediction.step_s", "at least 0"),
    "loss of less than nothing": (changed(("timing", "loss_s", 1), -1.0), "$.timing.loss_s[1]", "at least 0"),
    "part longer than the whole": (
        changed(("stages", 0, "backward_weight_s"), 0.75),
        "$.stages[0].backward_weight_s",
        "a part of backward_s (0.5), got 0.75",
    ),
    "link without bandwidth": (
        changed(("timing", "links"), [{"source": 0, "target": 1, "latency_s": 0.0, "bytes_per_s": 0.0}]),
        "$.timing.links[0].bytes_per_s",
        "above 0",
    ),
    "no core": (changed(("timing", "n_cores"), 0), "$.timing.n_cores", "above 0"),
    "no thread": (changed(("n_threads",), 0), "$.n_threads", "above 0"),
    "no integer of any machine": (
        changed(("stages", 1, "memory_bytes"), 10**400),
        "$.stages[1].memory_bytes",
        "64 bits",
    ),
    "missing wires": (changed(("wires",), []), "$.wires", "'a' is used by $.ops[1] on stage 1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_contradiction_is_refused_with_its_path(case: str) -> None:
    value, path, words = REFUSALS[case]
    with pytest.raises(PlanError) as refused:
        parse(value)
    assert refused.value.message.startswith(f"{path}: ")
    assert words in refused.value.message


def test_a_schedule_of_one_stage_per_worker_is_refused_where_one_owns_two() -> None:
    value = as_json()
    value["stages"][1] |= {"devices": ["cpu"], "workers": [1]}
    value["stages"][2]["workers"] = [1]
    with pytest.raises(PlanError, match=r"^\$\.schedule: 1f1b runs one stage per worker; worker 1 owns several"):
        parse(value)
    assert parse(value | {"schedule": "fill-drain"}).layout().n_workers == 2


def test_any_number_of_microbatches_is_read_at_once() -> None:
    """It used to lay out the order of all of them."""
    value = as_json()
    value["stages"][1] |= {"devices": ["cpu"], "workers": [1]}
    value["stages"][2]["workers"] = [2]
    assert parse(value | {"schedule": "zb-h1", "n_microbatches": 10**15}).n_microbatches == 10**15


def test_a_stage_without_ops_is_refused() -> None:
    value = as_json()
    value["ops"][1]["stage"] = 2
    value["wires"] = [value["wires"][0]]
    with pytest.raises(PlanError, match=r"^\$\.stages\[1\]: no op runs on this stage"):
        parse(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 200_000 + "]" * 200_000, ""),
        ('{"format": ' + "[" * 2_000 + "]" * 2_000 + "}", ""),
        ('{"format": 1, "model": ' + "[" * 900 + "]" * 900 + "}", ""),
        ('{"format": ' + "1" * 5_000 + "}", "no JSON"),
        ('{"format": NaN}', "got nan"),
        ("null", "expected an object"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(PlanError, match=r"broken\.json") as refused:
        load(file)
    assert words in refused.value.message
    assert len(refused.value.message) < 1000


def test_a_file_that_is_no_text_is_refused_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"\x80\x02\xff")
    with pytest.raises(PlanError, match=r"weights\.bin: no JSON"):
        load(file)


def test_a_file_that_is_not_there_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.json: No such file"):
        load(tmp_path / "plan.json")


@pytest.mark.parametrize("path", [path for path in PLACES if path and isinstance(path[-1], str)])
def test_every_missing_key_is_named(path: tuple[Any, ...]) -> None:
    with pytest.raises(PlanError) as refused:
        parse(without(path))
    place = "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    assert refused.value.message.startswith(f"{place}: ")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 5)
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.sampled_from(["a", "b", "c", "x", "mask", "1f1b", "fill-drain", "", "\ud800"])
    | st.text(max_size=3),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.sampled_from(["name", "op", "a"]), inside),
    max_leaves=4,
)


@st.composite
def mutations(draw: st.DrawFn) -> Any:
    """A valid plan's JSON after one to three changes anywhere."""
    value = as_json()
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            value = draw(json_values) if draw(st.integers(0, 20)) == 0 else value
            continue
        owner, key = at(value, path[:-1]), path[-1]
        what = draw(st.sampled_from(["replace", "delete", "insert", "repeat", "exchange"]))
        if what == "replace":
            owner[key] = draw(json_values)
        elif what == "delete":
            del owner[key]
        elif what == "insert" and isinstance(owner, list):
            owner.insert(key, draw(json_values))
        elif what == "insert":
            owner[draw(st.sampled_from(["name", "stage", "extra"]))] = draw(json_values)
        elif what == "repeat" and isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        else:
            owner[key] = copy.deepcopy(at(value, draw(st.sampled_from(list(places(value))))))
        if not isinstance(value, (dict, list)):
            break
    return value


@property_test
@given(mutations())
def test_a_damaged_plan_is_read_or_refused_but_never_anything_else(value: Any) -> None:
    try:
        plan = parse(copy.deepcopy(value))
    except PlanError as error:
        refusal = error.message
    else:
        refusal = None
    event("read" if refusal is None else "refused")
    if refusal is not None:
        assert refusal.startswith("$")
        return
    assert to_json(plan) == value
    layout = plan.layout()
    assert layout.n_stages == len(plan.stages)
    assert all(source < target for source, target in layout.wires)
    assert set(layout.gradient_wires) <= set(layout.wires)
    check(lower(plan.schedule, layout, schedule(plan.schedule, layout, 4), 4))
    assert str(plan)
