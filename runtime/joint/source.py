"""Python source for some nodes of a graph: one line per op, values dropped after their last use.

``torch.fx`` writes such functions too. These take their arguments in a list that they empty, so that nobody holds what
they are done with; and they call an op by the entry that costs least (../../entries.py).
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...entries import entry
from ..parts import FILE, OP
from ..sinks import Sink, sums_of_rows
from .reuse import over_arguments

_n_files = 0


def function_of(
    takes: Sequence[str],
    nodes: Iterable[fx.Node],
    gives: Sequence[str | None],
    owner: torch.nn.Module,
    sunk: Mapping[str, Sequence[int]] | None = None,
) -> Callable[..., list[Any]]:
    """Compile ``nodes`` into a function from a list of the values ``takes``, which it empties, to those in ``gives``.

    ``owner`` has the modules and tensors that nodes name. With ``sunk``, the function takes a sink too, and gives it
    the values that ``sunk`` names, each as soon as it is there, under the numbers that ``sunk`` has for it.
    """
    writer, body = _Writer(owner), list(nodes)
    head = "def part(_given):\n" if sunk is None else "def part(_given, _sink):\n"
    sunk = sunk or {}
    lines = [f"    [{', '.join(takes)}] = _given", "    _given.clear()"]
    lines += [f"    _sink.add({number}, {name})" for name in takes for number in sunk.get(name, ())]
    last = _last_uses(takes, body, gives)
    instead = over_arguments(body, last, {*filter(None, gives), *sunk})
    for node in body:
        numbers = sunk.get(node.name, ())
        if node.target in _SINKS and len(numbers) == 1 and node.name not in gives and _is_only_given(node):
            line = f"    _sink.{_SINKS[node.target]}({numbers[0]}, {', '.join(map(writer.written, node.args))})"
            done = [name for name in last[node.name] if name != node.name]
        else:
            line = f"    {node.name} = {writer.call(node, *instead.get(node.name, ()))}"
            line += "".join(f"; _sink.add({number}, {node.name})" for number in numbers)
            done = last[node.name]
        place = node.meta.get("op")
        lines.append(line + "".join(f"; del {name}" for name in done) + (f"  {OP}{place}" if place else ""))
    lines.append(f"    return [{', '.join(map(str, gives))}]")
    return writer.compiled(head + "\n".join(lines) + "\n")


# Ops that a sink does itself, where it adds what they give.
_SINKS = {torch.ops.aten.mm.default: Sink.add_product.__name__, sums_of_rows: Sink.add_sums.__name__}


def _is_only_given(node: fx.Node) -> bool:
    """Say whether nothing but the graph's result uses a node."""
    return all(user.op == "output" for user in node.users)


def _last_uses(takes: Sequence[str], nodes: Sequence[fx.Node], gives: Sequence[str | None]) -> dict[str, list[str]]:
    """List, for every node, the values that nobody needs after it."""
    known = {*takes, *(node.name for node in nodes)} - set(gives)
    last: dict[str, str] = {}
    for node in nodes:
        last[node.name] = node.name
        last.update({argument.name: node.name for argument in node.all_input_nodes})
    found: dict[str, list[str]] = {node.name: [] for node in nodes}
    for name, user in last.items():
        if name in known:
            found[user].append(name)
    return found


class _Writer:
    def __init__(self, owner: torch.nn.Module) -> None:
        self.owner = owner
        self.names: dict[str, Any] = {}
        self._of: dict[int, str] = {}

    def call(self, node: fx.Node, target: Any = None, args: Any = None, kwargs: Any = None) -> str:
        """Write what a node does; with ``target`` and its arguments in place of its own if given."""
        if node.op == "get_attr":
            return self._bound(_attribute(self.owner, str(node.target)))
        own = target is None
        arguments = [self.written(argument) for argument in (node.args if own else args)]
        arguments += [f"{key}={self.written(argument)}" for key, argument in (node.kwargs if own else kwargs).items()]
        if node.op == "call_module":
            return f"{self._bound(self.owner.get_submodule(str(node.target)))}({', '.join(arguments)})"
        assert node.op == "call_function", node.op
        return f"{self._bound(entry(node.target if own else target))}({', '.join(arguments)})"

    def written(self, value: Any) -> str:
        """Write an argument."""
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self.written(item) for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if value else ''})"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        return self._bound(value)  # floats too: some have no literal

    def _bound(self, value: Any) -> str:
        """Return the name of a global that holds ``value``."""
        if id(value) not in self._of:
            self._of[id(value)] = f"_{len(self.names)}"
            self.names[self._of[id(value)]] = value
        return self._of[id(value)]

    def compiled(self, source: str) -> Callable[..., list[Any]]:
        global _n_files
        _n_files += 1
        file = f"{FILE} {_n_files}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec"), self.names)
        part: Callable[..., list[Any]] = self.names["part"]
        return part


def _attribute(owner: torch.nn.Module, path: str) -> Any:
    value: Any = owner
    for name in path.split("."):
        value = getattr(value, name)
    return value
