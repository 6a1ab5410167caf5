"""What a capture could and could not open, as a text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from ..runtime.program import InputLeaf
from ..runtime.program.calls import Guarded
from .advice import advice
from .folding import fold
from .hidden import flop_share, parameter_share
from .places import nearby, place_of
from .recording.emit import ONLY, OWNER, is_structural

if TYPE_CHECKING:
    from .captured import Capture, OpaqueCall

_MOST_CONSTANTS = 6
_LONGEST_VALUE = 40


def report(capture: Capture) -> str:
    """Say what was captured, what was kept whole, why, how much that hides from a cut, and what the graph is for."""
    return "\n".join([_headline(capture), *_opaque(capture), *_validity(capture)])


def _headline(capture: Capture) -> str:
    name = type(capture.model).__name__
    n_ops = _count(sum(1 for node in capture.graph.nodes if node.op.startswith("call_")), "op")
    n_opaque = len(capture.opaque)
    if not n_opaque:
        return f"{name}: {n_ops}; captured whole, with no opaque modules"
    if capture.is_whole:
        return f"{name}: {n_ops}; the whole model is 1 opaque module and cannot be cut"
    n_functions = sum(1 for call in capture.opaque if call.function)
    kinds = ((n_opaque - n_functions, "opaque module"), (n_functions, "opaque function"))
    counts = " and ".join(_count(n, noun) for n, noun in kinds if n)
    return f"{name}: {n_ops}; not captured whole, with {counts} that cannot be cut inside"


# --- opaque modules --------------------------------------------------------------------------------------------------


def _opaque(capture: Capture) -> Iterator[str]:
    entries = _entries(capture)
    for name, calls in entries:
        yield from _entry(capture, name, calls)
    if len(entries) > 1:
        yield f"  together they hide {_shares(capture, capture.opaque)} from the cut"


def _entries(capture: Capture) -> list[tuple[str, list[OpaqueCall]]]:
    """Put modules of one class that were kept for one reason together where their names differ in numbers only."""
    alike: dict[Any, dict[str, OpaqueCall]] = {}
    for call in capture.opaque:
        alike.setdefault((call.type_name, call.reason, call.source), {})[call.name] = call
    return [(name, [calls[path] for path in paths]) for calls in alike.values() for name, paths in fold(calls)]


def _entry(capture: Capture, name: str, calls: Sequence[OpaqueCall]) -> Iterator[str]:
    first, times = calls[0], f" ×{len(calls)}" if len(calls) > 1 else ""
    yield f"  opaque {name or '(the whole model)'}{times} ({first.type_name}): {first.reason}"
    place = place_of(first.function or capture.model.get_submodule(first.path).forward, first.reason, first.source)
    if place and first.reason != "asked for":
        yield f"    where: {place}"
    yield f"    hides from the cut: {_shares(capture, calls)}"
    change = advice(first.reason)
    if change:
        yield f"    to open it: {change}"


def _shares(capture: Capture, calls: Sequence[OpaqueCall]) -> str:
    parameters = f"{_percent(parameter_share(capture, calls))} of the parameters"
    flops = flop_share(capture, calls)
    if flops is None:
        without = "the model has no matrix products" if capture.flops else "it does not run by itself"
        return f"{parameters}, FLOPs unknown ({without})"
    return f"{parameters} and {_percent(flops)} of the forward FLOPs"


def _percent(share: float) -> str:
    if 0 < share < 0.01:
        return "under 1%"
    return "over 99%" if 0.99 < share < 1 else f"{share:.0%}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# --- what the graph is for -------------------------------------------------------------------------------------------


def _validity(capture: Capture) -> Iterator[str]:
    rows = capture.inputs.rows
    yield "the graph is valid for:"
    yield "  any batch size" if rows is None else f"  batches of {rows} rows only"
    for leaf in capture.inputs.leaves:
        if leaf.graph_input is not None:
            yield f"  argument {leaf.path}: {_shape(leaf, rows)}"
    yield from _constants([leaf for leaf in capture.inputs.leaves if leaf.graph_input is None])
    yield from _size_checks(capture)
    differ = capture.trained != capture.evaluated or any(map(_of_one_mode, capture.union.graph.nodes))
    yield f"training and evaluation run {'different' if differ else 'the same'} ops"
    n_groups = sum(1 for n in capture.graph.nodes if n.op == "call_module" and str(n.target).startswith("_checkpoint_"))
    if n_groups:
        yield f"{_count(n_groups, 'checkpointed group')} of ops, computed again in the backward"


def _of_one_mode(node: fx.Node) -> bool:
    return ONLY in node.meta or (OWNER in node.meta and is_structural(node))


def _shape(leaf: InputLeaf, rows: int | None) -> str:
    if leaf.shape is None:
        return "any shape"
    if not leaf.shape:
        return "a tensor with one number"
    first = "rows" if rows is None else str(rows)
    sizes = ["any" if size is None else str(size) for size in leaf.shape]
    return f"shape ({', '.join([first, *sizes[1:]] if leaf.batched else sizes)})"


def _constants(leaves: Sequence[InputLeaf]) -> Iterator[str]:
    """Name the arguments that are no tensors; the graph holds their values."""
    if not leaves:
        return
    values = [f"{leaf.path}={_short(leaf.constant)}" for leaf in leaves[:_MOST_CONSTANTS]]
    more = f" and {len(leaves) - _MOST_CONSTANTS} more" if len(leaves) > _MOST_CONSTANTS else ""
    yield f"  these values, which are part of the graph: {', '.join(values)}{more}"


def _size_checks(capture: Capture) -> Iterator[str]:
    guards = [node.target for node in capture.graph.nodes if isinstance(node.target, Guarded)]
    places = list(dict.fromkeys(nearby(guard.place) for guard in guards))
    if guards:
        yield f"  sizes for which the model branches as it did when captured ({', '.join(places)}); others are refused"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
