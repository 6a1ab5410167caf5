"""Records to JSON and back, and what a reader is told where the file is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.errors import PlanError
from stagecut.records import from_json, to_json

property_test = settings(max_examples=80, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Inner:
    name: str
    weight: float
    on: bool


@dataclass(frozen=True)
class Outer:
    count: int
    note: str | None
    many: tuple[Inner, ...]
    pair: tuple[int, str]
    table: Mapping[str, float]
    one: Inner | None


finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, st.text(), finite, st.booleans())
outers = st.builds(
    Outer,
    st.integers(),
    st.none() | st.text(),
    st.lists(inners, max_size=3).map(tuple),
    st.tuples(st.integers(), st.text()),
    st.dictionaries(st.text(), finite, max_size=3),
    st.none() | inners,
)


def plain(**changes: Any) -> dict[str, Any]:
    record = Outer(1, None, (Inner("a", 0.5, True),), (2, "b"), {"k": 1.0}, None)
    return {**to_json(record), **changes}


@property_test
@given(outers)
def test_a_record_survives_the_way_through_json_text(record: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(record)))) == record


@property_test
@given(finite)
def test_a_float_keeps_every_bit(number: float) -> None:
    record = Inner("x", number, False)
    back = from_json(Inner, json.loads(json.dumps(to_json(record))))
    assert back.weight.hex() == number.hex()


def test_an_integer_is_read_as_a_float_where_the_field_is_one() -> None:
    back = from_json(Inner, {"name": "x", "weight": 3, "on": True})
    assert type(back.weight) is float
    assert back.weight == 3.0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_have_are_not_written(number: float) -> None:
    with pytest.raises(PlanError, match="no place in a JSON file"):
        to_json(Inner("x", number, False))


@pytest.mark.parametrize(
    ("value", "path", "words"),
    [
        ([], "$", "expected an object, got list"),
        (None, "$", "expected an object, got NoneType"),
        (plain(extra=1), "$.extra", "unknown key; Outer has count, note"),
        ({k: v for k, v in plain().items() if k != "pair"}, "$.pair", "missing key of Outer"),
        (plain(count=True), "$.count", "expected an integer, got bool True"),
        (plain(count=1.0), "$.count", "expected an integer, got float 1.0"),
        (plain(count="1"), "$.count", "expected an integer, got str '1'"),
        (plain(note=3), "$.note", "expected a string, got int 3"),
        (plain(many={}), "$.many", "expected an array, got dict"),
        (plain(many=[{"name": "a", "weight": "heavy", "on": True}]), "$.many[0].weight", "expected a number, got str"),
        (plain(many=[{"name": "a", "weight": False, "on": True}]), "$.many[0].weight", "expected a number, got bool"),
        (plain(many=[{"name": "a", "weight": 1, "on": 1}]), "$.many[0].on", "expected true or false, got int 1"),
        (plain(many=[{"name": "a", "weight": float("nan"), "on": True}]), "$.many[0].weight", "finite number"),
        (plain(pair=[1]), "$.pair", "expected an array of 2 items, got 1"),
        (plain(pair=[1, 2]), "$.pair[1]", "expected a string, got int 2"),
        (plain(table={"k": []}), "$.table.k", "expected a number, got list"),
        (plain(one=[]), "$.one", "expected an object, got list"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(value: Any, path: str, words: str) -> None:
    with pytest.raises(PlanError) as refused:
        from_json(Outer, value)
    assert refused.value.message.startswith(f"{path}: ")
    assert words in refused.value.message


def test_a_number_too_large_for_a_float_is_refused_with_its_path() -> None:
    with pytest.raises(PlanError, match=r"\$\.weight: expected a finite number"):
        from_json(Inner, {"name": "x", "weight": 10**400, "on": True})


@pytest.mark.parametrize("number", [2**63, -(2**63), 10**400])
def test_an_integer_that_no_machine_has_is_refused_with_its_path(number: int) -> None:
    with pytest.raises(PlanError, match=r"^\$\[1\]: expected an integer of at most 64 bits"):
        from_json(tuple[int, int], [2**63 - 1, number])


def test_a_deeply_nested_value_is_refused_with_its_path() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(PlanError, match=r"\$\.name: expected a string, got list"):
        from_json(Inner, {"name": deep, "weight": 0.0, "on": True})


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(PlanError) as refused:
        from_json(Inner, {"name": list(range(10_000)), "weight": 0.0, "on": True})
    assert len(refused.value.message) < 200
