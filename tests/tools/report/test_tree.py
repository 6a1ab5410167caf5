"""The tree of modules that the page folds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecut.partitioner.plan import OpRecord
from stagecut.tools.report.tree import MAX_CHILDREN, MODULE, PART, RUN, STAGE, tree_of


def op(index: int, path: str, stage: int = 0, target: str = "relu") -> OpRecord:
    return OpRecord(f"op{index}", target, path, None, stage, (), 1.0, 1.0, 8, 8, "analytic")


def with_ops(plan: Any, ops: list[OpRecord]) -> Any:
    return replace(plan, ops=tuple(ops))


def children(plan: Any) -> dict[int, int]:
    tree = tree_of(plan)
    found = dict.fromkeys(range(len(tree.nodes)), 0)
    for node in tree.nodes:
        if node.parent >= 0:
            found[node.parent] += 1
    for node in tree.node_of:
        found[node] += 1
    return found


def test_like_modules_in_a_row_are_a_run(plan):
    paths = ["stem", *(f"blocks.{n}.{part}" for n in range(3) for part in ("norm", "linear")), "head"]
    tree = tree_of(with_ops(plan, [op(i, path) for i, path in enumerate(paths)]))
    (run,) = [node for node in tree.nodes if node.kind == RUN]
    assert (run.label, run.copies) == ("blocks.0 … 2", 3)
    assert [node.label for node in tree.nodes if node.kind == MODULE] == ["blocks", "blocks.0", "blocks.1", "blocks.2"]


def test_modules_with_other_ops_are_no_run(plan):
    paths = [f"blocks.{n}.{part}" for n in range(3) for part in ("norm", "linear")]
    ops = [op(i, path, target="gelu" if i == 2 else "relu") for i, path in enumerate(paths)]
    assert not [node for node in tree_of(with_ops(plan, ops)).nodes if node.kind == RUN]


def test_a_module_in_two_stages_is_a_node_of_each(plan):
    ops = [op(0, "block.a", 0), op(1, "block.b", 0), op(2, "block.a", 1), op(3, "block.b", 1), op(4, "end", 2)]
    tree = tree_of(with_ops(plan, ops))
    assert [node.kind for node in tree.nodes].count(STAGE) == 3
    assert [node.label for node in tree.nodes if node.kind == MODULE] == ["block", "block"]


@pytest.mark.parametrize("n", [61, 1000, 5000])
def test_many_ops_without_a_module_are_parts(plan, n):
    flat = with_ops(plan, [op(i, "") for i in range(n)])
    assert max(children(flat).values()) <= MAX_CHILDREN
    assert any(node.kind == PART and node.label == "op0 … op29" for node in tree_of(flat).nodes)


@settings(max_examples=100, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.sampled_from("ab"), max_size=4)), min_size=1, max_size=150))
def test_every_op_has_a_place_in_its_stage_and_no_node_too_many(plan, placed):
    ops = [op(i, ".".join(path), stage) for i, (stage, path) in enumerate(placed)]
    tree = tree_of(with_ops(plan, ops))
    assert max(children(with_ops(plan, ops)).values()) <= MAX_CHILDREN
    for made, node in zip(ops, tree.node_of):
        while tree.nodes[node].parent >= 0:
            assert tree.nodes[node].parent < node
            node = tree.nodes[node].parent
        assert node == [i for i, each in enumerate(tree.nodes) if each.kind == STAGE][made.stage]
