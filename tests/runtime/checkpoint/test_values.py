"""Values as JSON and back."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecut.errors import CheckpointError
from stagecut.runtime.checkpoint.values import decoded, encoded

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(values)
def test_values_come_back_equal_and_of_their_types(value: Any) -> None:
    back = decoded(json.loads(json.dumps(encoded(value, "x"), allow_nan=False)))
    assert back == value
    assert repr(back) == repr(value)


def test_what_json_has_no_words_for_comes_back() -> None:
    value = {"milestones": Counter({30: 1, 60: 2}), "best": math.inf, "last": (-math.inf, 0.1 + 0.2)}
    back = decoded(json.loads(json.dumps(encoded(value, "x"), allow_nan=False)))
    assert back == value
    assert type(back["milestones"]) is Counter
    assert math.isnan(decoded(encoded(math.nan, "x")))


@pytest.mark.parametrize("value", [object(), {"f": print}, [{1, 2}], {"a": (b"x",)}])
def test_what_only_pickle_could_keep_is_refused_with_its_path(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"scheduler\S* is a \w+, which a checkpoint cannot hold"):
        encoded(value, "scheduler")


@pytest.mark.parametrize(
    "value",
    [{}, {"kind": "os.system"}, {"kind": "tuple"}, {"kind": "dict", "items": [[1]]}, {"kind": "float", "text": "1+1"}],
)
def test_what_was_not_written_by_us_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError):
        decoded(value)


def test_a_key_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(CheckpointError, match="a key that cannot be one"):
        decoded({"kind": "dict", "items": [[[1], 2]]})
