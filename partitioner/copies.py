"""Ops computed again on the stage that uses them, where that is cheaper than sending their value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import fx, nn

from ..structure import tensors_in
from .analysis import OpFacts
from .captured import Capture
from .opgraph import OpNode, is_switch
from .recording.emit import ONLY

_PLAIN = ("torch", "_operator", "operator", "math", "builtins")


def copyable(capture: Capture, facts: Mapping[str, OpFacts], together: Sequence[Sequence[str]]) -> frozenset[str]:
    """Name the ops that may run on several stages: functions of torch without state, randomness or side effects."""
    tied = {name for group in together for name in group}
    module = capture.graph_module
    modes = {node.name for node in capture.union.graph.nodes if ONLY in node.meta}
    return frozenset(
        node.name
        for node in module.graph.nodes
        if node.name not in tied | modes
        and _is_plain(node, module)
        and not facts[node.name].random
        and not facts[node.name].written
        and tensors_in(facts[node.name].value)
        and not any(is_switch(used, module) for used in node.all_input_nodes)
    )


def _is_plain(node: fx.Node, module: fx.GraphModule) -> bool:
    if node.op == "call_method":
        return True
    if node.op == "call_function":
        return str(getattr(node.target, "__module__", "")).partition(".")[0] in _PLAIN
    if node.op != "call_module":
        return False
    called: nn.Module = module.get_submodule(str(node.target))
    stateless = next(called.parameters(), None) is None and next(called.buffers(), None) is None
    return stateless and type(called).__module__.startswith("torch.nn")


def cone(
    name: str,
    ops: Mapping[str, OpNode],
    may_copy: Collection[str],
    is_there: Callable[[str], bool],
) -> tuple[list[str], list[str]]:
    """Return the ops to run again for the value ``name``, and the values to be sent for that.

    ``is_there`` tells which ops' values the consuming stage has anyway; it has every input of the graph.
    """
    again: dict[str, None] = {}
    sent: dict[str, None] = {}
    waiting = [name]
    while waiting:
        own = waiting.pop()
        if own in again or is_there(own):
            continue
        if own not in may_copy:
            sent[own] = None
            continue
        again[own] = None
        waiting += [used for used in ops[own].inputs if used in ops]
    return list(again), list(sent)


def choose_copies(
    ops: Mapping[str, OpNode],
    stage_of: Mapping[str, int],
    wires: Mapping[str, Sequence[int]],
    may_copy: Collection[str],
    wire_s: Callable[[str], float],
    compute_s: Callable[[str, int], float],
) -> dict[str, tuple[int, ...]]:
    """Choose, wire by wire in graph order, what the consuming stage computes again.

    Args:
        wires: per value that crosses, the stages that it goes to.
        wire_s: seconds that sending an op's value to one stage costs, gradient included.
        compute_s: seconds, forward and backward, of an op on a stage.

    Returns:
        Per op that runs on further stages, these stages.
    """
    copies: dict[str, set[int]] = {}
    for name in (name for name in ops if name in wires and name in may_copy):
        for stage in wires[name]:

            def is_there(other: str, stage: int = stage, name: str = name) -> bool:
                if stage_of[other] == stage or stage in copies.get(other, ()):
                    return True
                return other != name and stage in wires.get(other, ())

            again, sent = cone(name, ops, may_copy, is_there)
            cost = sum(compute_s(other, stage) for other in again) + sum(map(wire_s, sent))
            if again and cost < wire_s(name):
                for other in again:
                    copies.setdefault(other, set()).add(stage)
    return {name: tuple(sorted(stages)) for name, stages in copies.items()}
