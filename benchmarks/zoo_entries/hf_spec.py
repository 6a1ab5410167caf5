"""What a Hugging Face architecture is in the zoo: a configuration, two classes, and two calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .entry import Call, Entry
from .hf_build import build_model, tiny_config

Inputs = Callable[[Any, int], dict[str, Any]]


@dataclass(frozen=True)
class Spec:
    """An architecture.

    Attributes:
        model_type: as the library's configurations call it.
        plain: the class of the forward without labels, and its inputs for a configuration and a number of rows;
            ``None`` where the architecture has no such forward.
        trained: the class with a loss, and its inputs with labels; ``None`` likewise.
        sizes: what the configuration has beyond the common small sizes.
        unjudged: why two runs cannot be compared, where they cannot.
        name: where one type is there twice.
    """

    model_type: str
    plain: tuple[str, Inputs] | None
    trained: tuple[str, Inputs] | None
    sizes: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    name: str = ""
    unjudged: str = ""

    def entries(self) -> list[Entry]:
        """Make the entries ``type`` (plain forward) and ``type+loss``."""
        both = (("", self.plain), ("+loss", self.trained))
        return [self._entry(suffix, *use) for suffix, use in both if use is not None]

    def _entry(self, suffix: str, class_name: str, inputs: Inputs) -> Entry:
        def build() -> nn.Module:
            return build_model(class_name, tiny_config(self.model_type, **self.sizes))

        def call(rows: int) -> Call:
            return (), inputs(tiny_config(self.model_type, **self.sizes), rows)

        return Entry(
            "hf", (self.name or self.model_type) + suffix, build, call, 4, 6, note=self.note, unjudged=self.unjudged
        )
