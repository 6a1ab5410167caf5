"""One model of the zoo: how it is built, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _nothing() -> None:
    """Reset nothing."""


@dataclass(frozen=True)
class Entry:
    """A model with its call.

    Attributes:
        group: torchvision, timm, hf or nasty.
        name: unique in its group.
        build: makes the model; weights come from torch's global generator.
        call: makes the arguments for so many rows, from torch's global generator.
        batch: rows of the call that is captured.
        other_batch: another number of rows, or ``None`` where the number of rows is part of the call's structure.
        n_parameters: roughly, where it is large enough to matter for memory.
        note: what is special about the entry.
        modes: the model can be switched to evaluation.
        copies: ``copy.deepcopy`` of the model works; else its twin is built from the same seed.
        unjudged: why runs of the model cannot be compared, where they cannot.
        reset: brings state outside of the model back to its beginning, before every run.
    """

    group: str
    name: str
    build: Callable[[], nn.Module]
    call: Callable[[int], Call]
    batch: int = 2
    other_batch: int | None = 3
    n_parameters: int = 0
    note: str = ""
    modes: bool = True
    copies: bool = True
    unjudged: str = ""
    reset: Callable[[], None] = _nothing

    @property
    def label(self) -> str:
        """Return the name with its group."""
        return f"{self.group}/{self.name}"


@dataclass(frozen=True)
class Table:
    """The entries of one group, and what the group misses on this machine."""

    entries: Mapping[str, Entry]
    missing: Mapping[str, str] = field(default_factory=dict)


def table_of(entries: list[Entry], missing: Mapping[str, str] | None = None) -> Table:
    """Index entries by name.

    Raises:
        ValueError: two entries have the same name.
    """
    table: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in table:
            raise ValueError(f"two entries are called {entry.label}")
        table[entry.name] = entry
    return Table(table, dict(missing or {}))
