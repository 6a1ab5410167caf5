"""Numbers that remember where they come from: sizes of tensors, and arithmetic on them.

The model's Python computes with these as with any number. Where one of them ends up in a torch call, the graph can
compute it again instead of keeping the value of the example; where Python compares one, the outcome is kept as a guard.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Number = int | float


@dataclass(frozen=True)
class Ref:
    """The value of the ``index``-th call of a recording; ``path`` leads to a part of it (see ``parts_of``)."""

    index: int
    path: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Expr:
    """How a number is computed: ``size`` of (Ref, dim), ``numel`` of (Ref,), ``value`` of (Ref,), or an operator."""

    name: str
    args: tuple[Any, ...]

    @property
    def from_data(self) -> bool:
        """Say whether an opaque module returned a number that it is computed from."""
        return self.name == "value" or any(isinstance(arg, Expr) and arg.from_data for arg in self.args)

    def refs(self) -> list[Ref]:
        """List the values that the number is computed from."""
        found: list[Ref] = []
        for arg in self.args:
            found += arg.refs() if isinstance(arg, Expr) else [arg] if isinstance(arg, Ref) else []
        return found


@dataclass(frozen=True)
class Guard:
    """A comparison that Python made on a known number: it decided what was recorded."""

    left: Any
    comparison: str
    right: Any
    outcome: bool
    path: str
    source: str | None


class Known:
    """What integers and floats that remember have in common. ``watch`` is told of every comparison."""

    expr: Expr
    watch: Callable[[Any, str, Any, bool], None]


def plain(number: Any) -> Any:
    """Return the same number without memory."""
    if isinstance(number, KnownInt):
        return int.__int__(number)
    return float.__float__(number) if isinstance(number, KnownFloat) else number


def _know(value: Any, expr: Expr, watch: Any) -> Any:
    if type(value) is int:
        return KnownInt.make(value, expr, watch)
    return KnownFloat.make(value, expr, watch) if type(value) is float else value


def _operand(value: Any) -> Any:
    return value.expr if isinstance(value, Known) else value


def _binary(name: str, reflected: bool) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def compute(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        a, b = (other, self) if reflected else (self, other)
        return _know(function(plain(a), plain(b)), Expr(name, (_operand(a), _operand(b))), self.watch)

    return compute


def _unary(name: str) -> Callable[[Any], Any]:
    function = getattr(operator, name)
    return lambda self: _know(function(plain(self)), Expr(name, (self.expr,)), self.watch)


def _compared(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def compare(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        outcome = function(plain(self), plain(other))
        self.watch(self, name, other, outcome)
        return outcome

    return compare


def _truth(self: Any) -> bool:
    outcome = plain(self) != 0
    self.watch(self, "ne", 0, outcome)
    return bool(outcome)


class KnownInt(Known, int):
    """An integer with memory."""

    @classmethod
    def make(cls, value: int, expr: Expr, watch: Any) -> KnownInt:
        """Attach ``expr`` to ``value``."""
        self = cls(value)
        self.expr, self.watch = expr, watch
        return self

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __reduce__(self) -> Any:
        return int, (plain(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(plain(self))


class KnownFloat(Known, float):
    """A float with memory."""

    @classmethod
    def make(cls, value: float, expr: Expr, watch: Any) -> KnownFloat:
        """Attach ``expr`` to ``value``."""
        self = cls(value)
        self.expr, self.watch = expr, watch
        return self

    def __hash__(self) -> int:
        return float.__hash__(self)

    def __reduce__(self) -> Any:
        return float, (plain(self),)

    def __deepcopy__(self, memo: Any) -> float:
        return float(plain(self))


for _kind in (KnownInt, KnownFloat):
    for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
        setattr(_kind, f"__{_name}__", _binary(_name, False))
        setattr(_kind, f"__r{_name}__", _binary(_name, True))
    for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(_kind, f"__{_name}__", _compared(_name))
    for _name in ("neg", "abs"):
        setattr(_kind, f"__{_name}__", _unary(_name))
    setattr(_kind, "__bool__", _truth)  # noqa: B010 (a type checker objects to the assignment)
