"""Nested values as leaves and nesting, and calls as leaves however they were written."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree

from stagecut.structure import call_leaves, flatten, is_encodable, leaf_paths, map_leaves, tensors_in, unflatten

property_test = settings(max_examples=80, deadline=None, derandomize=True)


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass
class Box:
    first: Any
    second: Any = None
    derived: Any = field(init=False, default=0)


@dataclass(frozen=True)
class Frozen:
    only: Any


class Registered:
    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Registered) and (self.left, self.right) == (other.left, other.right)

    __hash__ = None  # type: ignore[assignment]


_pytree.register_pytree_node(
    Registered, lambda value: ([value.left, value.right], None), lambda children, _: Registered(*children)
)


class Unknown:
    """A class that nobody registered: it stays one leaf."""


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False)


def containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keyed = st.dictionaries(st.text(max_size=3), inside, max_size=3)
    return st.one_of(
        st.lists(inside, max_size=3),
        st.lists(inside, max_size=3).map(tuple),
        keyed,
        keyed.map(OrderedDict),
        st.builds(Point, inside, inside),
        st.builds(Box, inside, inside),
        st.builds(Frozen, inside),
        st.builds(Registered, inside, inside),
    )


nested = st.recursive(scalars, containers, max_leaves=12)


def same(a: Any, b: Any) -> bool:
    """Equality that also compares the types, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (Box, Frozen, Registered)):
        return same(vars(a), vars(b))
    return bool(a == b)


@property_test
@given(nested)
def test_unflatten_gives_back_what_flatten_took(value: Any) -> None:
    leaves, structure = flatten(value)
    assert structure.n_leaves == len(leaves)
    assert all(leaf is None or isinstance(leaf, (int, float, str)) for leaf in leaves)
    assert same(unflatten(structure, leaves), value)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, while it pickles its specs
@property_test
@given(nested)
def test_structures_of_equal_nesting_are_equal_and_survive_a_pickle(value: Any) -> None:
    _, structure = flatten(value)
    _, other = flatten(map_leaves(lambda _: "another leaf", value))
    assert structure == other
    leaves = list(range(structure.n_leaves))
    assert same(unflatten(pickle.loads(pickle.dumps(structure)), leaves), unflatten(structure, leaves))


@property_test
@given(nested, nested)
def test_structures_tell_different_nestings_apart(a: Any, b: Any) -> None:
    def skeleton(value: Any) -> Any:
        return map_leaves(lambda _: 0, value)

    assert (flatten(a)[1] == flatten(b)[1]) == same(skeleton(a), skeleton(b))


@pytest.mark.parametrize("empty", [(), [], {}, OrderedDict()])
def test_an_empty_container_has_no_leaves_and_comes_back(empty: Any) -> None:
    leaves, structure = flatten(empty)
    assert leaves == []
    assert same(unflatten(structure, []), empty)


def test_what_nobody_registered_is_one_leaf() -> None:
    value = Unknown()
    leaves, structure = flatten([value, torch.float32, 1j])
    assert leaves[0] is value
    assert leaves[1:] == [torch.float32, 1j]
    assert structure.n_leaves == 3


def test_a_size_stays_a_size() -> None:
    back = unflatten(*reversed(flatten([torch.Size([2, 3])])))
    assert type(back[0]) is torch.Size
    assert back == [torch.Size([2, 3])]


def test_tensors_are_leaves_and_are_kept_as_they_are() -> None:
    x, y = torch.zeros(2), torch.ones(3)
    value = {"a": x, "b": [Box(y, None), 3]}
    assert [id(t) for t in tensors_in(value)] == [id(x), id(y)]
    back = unflatten(*reversed(flatten(value)))
    assert back["a"] is x
    assert back["b"][0].first is y


def test_a_wrong_number_of_leaves_is_refused() -> None:
    _, structure = flatten((1, 2))
    with pytest.raises(ValueError, match="structure has 2 leaves, got 3"):
        unflatten(structure, [1, 2, 3])


@pytest.mark.parametrize(
    ("value", "travels"),
    [
        (torch.zeros(2), True),
        ((1, [2.0, None], {"k": torch.Size([1])}), True),
        (torch.bfloat16, True),
        (torch.device("cpu"), True),
        (torch.zeros(2).to_sparse(), False),
        ([torch.zeros(2).to_sparse()], False),
        (Unknown(), False),
        (Point(1, 2), False),
        ({1: torch.zeros(1)}, False),
        (slice(0, 1), False),
        ((Unknown(),), False),
    ],
)
def test_only_tensors_numbers_strings_and_plain_containers_travel(value: Any, travels: bool) -> None:
    assert is_encodable(value) is travels


def f(x: Any, mask: Any = None, *rest: Any, scale: Any = 1, **more: Any) -> None:
    """A signature with every kind of parameter but positional-only."""


def g(x: Any, /, a: Any = 1, b: Any = 2, *, c: Any = 3) -> None:
    """A signature with defaults in the middle."""


def test_positional_and_keyword_arguments_are_the_same_call() -> None:
    by_position = call_leaves(f, (1, 2), {})
    by_keyword = call_leaves(f, (1,), {"mask": 2})
    all_keywords = call_leaves(f, (), {"mask": 2, "x": 1})
    assert by_position == by_keyword == all_keywords
    assert by_position[0] == [1, 2]


def test_the_order_of_keywords_does_not_matter() -> None:
    assert call_leaves(g, (0,), {"c": 1, "b": 2}) == call_leaves(g, (0,), {"b": 2, "c": 1})
    assert call_leaves(f, (0,), {"u": 1, "v": 2}) == call_leaves(f, (0,), {"v": 2, "u": 1})


def test_defaults_that_were_not_written_are_left_to_the_function() -> None:
    leaves, structure = call_leaves(g, (0,), {"b": 5})
    assert leaves == [0, 5]
    args, kwargs = unflatten(structure, leaves)
    assert args == (0,)
    assert kwargs == {"b": 5}


def test_variable_arguments_are_leaves_in_order() -> None:
    leaves, structure = call_leaves(f, (1, 2, 3, 4), {"scale": 5, "other": [6, 7]})
    assert leaves == [1, 2, 3, 4, 5, 6, 7]
    args, kwargs = unflatten(structure, leaves)
    assert args == (1, 2, 3, 4)
    assert kwargs == {"scale": 5, "other": [6, 7]}


def test_arguments_that_do_not_fit_raise_what_python_raises() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nope'"):
        call_leaves(g, (0,), {"nope": 1})
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        call_leaves(f, (), {})


def test_leaf_paths_name_each_argument() -> None:
    assert leaf_paths(f, (1, (2, 3), 4, 5), {"scale": 6, "other": {"k": 7, "l": 8}}) == [
        "x",
        "mask_0",
        "mask_1",
        "rest_0",
        "rest_1",
        "scale",
        "other_0",
        "other_1",
    ]
    assert leaf_paths(g, (0,), {"c": 1, "b": 2}) == ["x", "b", "c"]


@property_test
@given(st.lists(nested, min_size=1, max_size=4), st.dictionaries(st.sampled_from(["scale", "u", "v"]), nested))
def test_every_leaf_of_a_call_has_a_path(args: list[Any], kwargs: dict[str, Any]) -> None:
    leaves, structure = call_leaves(f, tuple(args), kwargs)
    paths = leaf_paths(f, tuple(args), kwargs)
    assert len(paths) == len(leaves) == structure.n_leaves
    named = dict(zip(paths, leaves))
    for name, value in kwargs.items():
        if not isinstance(value, (list, tuple, dict, Box, Frozen, Registered)):
            assert same(named[name], value)


def test_what_was_flattened_is_not_kept_alive() -> None:
    gc.disable()
    try:
        tensor = torch.zeros(3)
        known = weakref.ref(tensor)
        flatten([{"a": tensor}, (tensor, None)])
        del tensor
        assert known() is None
    finally:
        gc.enable()
