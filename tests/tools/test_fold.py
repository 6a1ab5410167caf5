from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecut.partitioner.plan import OpRecord
from stagecut.tools.fold import INPUT, MODULE, OP, foldings


def op(name, path, stage, inputs, seconds=1.0, target=None):
    return OpRecord(name, target or path or name, path, None, stage, tuple(inputs), seconds, seconds, 4, 4, "analytic")


@st.composite
def op_lists(draw):
    """Draw ops in graph order, each in some module of a small tree and on the same or a later stage than its inputs."""
    ops = []
    for index in range(draw(st.integers(1, 25))):
        inputs = draw(st.lists(st.sampled_from(["x", *(o.name for o in ops)]), unique=True, max_size=3))
        stage = max([o.stage for o in ops if o.name in inputs], default=0) + draw(st.integers(0, 1))
        path = draw(st.sampled_from(["", "a", "a.b", "a.b.c", "a.d", "e"]))
        ops.append(op(f"op{index}", path, stage, inputs, seconds=draw(st.sampled_from([0.0, 1.0]))))
    return tuple(ops)


@given(op_lists())
def test_every_folding_has_each_op_once_and_no_circle(plan, ops):
    made = replace(plan, ops=ops, graph_inputs=("x",), wires=())
    for folded in foldings(made):
        kept = [name for box in folded.boxes if box.kind != INPUT for name in box.ops]
        assert sorted(kept) == sorted(o.name for o in ops)
        graph = nx.DiGraph((arrow.source, arrow.target) for arrow in folded.arrows)
        assert nx.is_directed_acyclic_graph(graph)
        assert all(made.stage_of[name] == box.stage for box in folded.boxes if box.kind != INPUT for name in box.ops)


def test_modules_are_folded_more_and_more(plan):
    sizes = [len(folded.boxes) for folded in foldings(plan)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] >= len(plan.stages)


def test_no_more_boxes_than_allowed_are_made_but_in_the_last_resort(plan):
    assert all(len(folded.boxes) - 1 <= 8 for folded in foldings(plan, max_boxes=8))
    assert len(list(foldings(plan, max_boxes=0))) == 1


def test_bytes_of_the_arrows_into_a_stage_are_those_of_its_wires(plan):
    for folded in foldings(plan):
        for stage in range(len(plan.stages)):
            into = sum(arrow.n_bytes for arrow in folded.arrows if folded.boxes[arrow.target].stage == stage)
            assert into == sum(wire.n_bytes for wire in plan.wires if stage in wire.targets)


def test_a_value_for_several_boxes_of_a_stage_is_counted_once(plan):
    ops = (op("v", "a", 0, []), op("p", "b", 1, ["v"]), op("q", "c", 1, ["v"]))
    wire = replace(plan.wires[0], value="v", source=0, targets=(1,), n_bytes=100)
    first = next(foldings(replace(plan, ops=ops, wires=(wire,), graph_inputs=())))
    assert [arrow.n_bytes for arrow in first.arrows] == [100, 0]


def test_a_module_that_surrounds_another_becomes_two_boxes(plan):
    ops = (op("a", "m.x", 0, []), op("b", "n", 0, ["a"]), op("c", "m.y", 0, ["b", "a"]))
    made = replace(plan, ops=ops, wires=(), graph_inputs=())
    sizes = {folded.depth: len(folded.boxes) for folded in foldings(made)}
    assert sizes == {None: 3, 0: 1}  # depth 1 has the same three boxes as none, and is left out


@pytest.mark.parametrize(
    ("path", "target", "kind", "label"),
    [("a.b", "a.b", MODULE, "a.b"), ("a.b", "torch.nn.functional.relu", OP, "relu"), ("", "_operator.add", OP, "add")],
)
def test_a_box_of_one_op_is_called_what_it_computes(plan, path, target, kind, label):
    made = replace(plan, ops=(op("v", path, 0, [], target=target),), wires=(), graph_inputs=())
    (box,) = next(foldings(made)).boxes
    assert (box.kind, box.label) == (kind, label)


def test_an_input_has_a_box_on_each_stage_that_uses_it(plan):
    ops = (op("v", "a", 0, ["x"]), op("w", "b", 1, ["x"]))
    folded = next(foldings(replace(plan, ops=ops, wires=(), graph_inputs=("x",))))
    assert [(box.label, box.stage) for box in folded.boxes if box.kind == INPUT] == [("x", 0), ("x", 1)]
    assert all(folded.boxes[arrow.source].stage == folded.boxes[arrow.target].stage for arrow in folded.arrows)
