"""Many module paths that differ in numbers only are told as one: ``blocks.{0..11}.mlp``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Pattern = tuple[str | None, ...]


def fold(paths: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Return groups of paths with a name for each, in the order of their first members.

    >>> fold(["blocks.0.mlp", "head", "blocks.1.mlp"])
    [('blocks.{0,1}.mlp', ('blocks.0.mlp', 'blocks.1.mlp')), ('head', ('head',))]
    """
    groups: dict[Pattern, list[tuple[str, ...]]] = {}
    for path in paths:
        parts = tuple(path.split("."))
        groups.setdefault(tuple(None if part.isdecimal() else part for part in parts), []).append(parts)
    folded = [group for pattern, members in groups.items() for group in _groups(pattern, members)]
    return [(_name(group), tuple(".".join(parts) for parts in group)) for group in folded]


def _groups(pattern: Pattern, members: list[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """Keep members together that are all combinations of their numbers, else those that differ in the last number."""
    if math.prod(len(set(column)) for column in zip(*members)) == len(set(members)):
        return [members]
    last = max(place for place, part in enumerate(pattern) if part is None)
    rows: dict[Pattern, list[tuple[str, ...]]] = {}
    for parts in members:
        rows.setdefault((*parts[:last], *parts[last + 1 :]), []).append(parts)
    return list(rows.values())


def _name(group: Sequence[tuple[str, ...]]) -> str:
    return ".".join(_column(list(dict.fromkeys(column))) for column in zip(*group))


def _column(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    numbers = sorted(map(int, parts))
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"
