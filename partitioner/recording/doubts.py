"""What is known of tensors without their data: shapes that depend on it, and comparisons whose outcome does not."""

from __future__ import annotations

from typing import Any

import torch

from ...structure import flatten
from . import functions
from .calls import parts_of

_OF_ONE_NUMBER = ("sum", "mean", "max", "min", "prod", "any", "all")


class Doubts:
    """Follows calls by the identity of what they give.

    Attributes:
        unsure: tensors whose shape depends on data.
        decided: comparisons of a random number between 0 and 1 with something that it cannot reach, by their outcome.
        coins: comparisons of one random number between 0 and 1 with something that it can reach.
    """

    def __init__(self) -> None:
        self.unsure: set[int] = set()
        self.decided: dict[int, bool] = {}
        self.coins: set[int] = set()
        self._uniform: set[int] = set()

    def note(self, name: str, args: Any, result: Any) -> None:
        """Follow one call of the function called ``name``."""
        self._doubt(name, args, result)
        self._decide(name, args, result)

    def _decide(self, name: str, args: Any, result: Any) -> None:
        if name == "rand" or (name == "uniform_" and tuple(args[1:]) in ((), (0, 1))):
            self._uniform.add(id(result))
        elif name in ("lt", "__lt__", "less", "gt", "__gt__", "greater", "le", "ge") and len(args) == 2:
            bound = args[1]
            if id(args[0]) not in self._uniform or not isinstance(bound, (int, float)):
                return
            if 0 < bound < 1:
                self.coins.update([id(result)] if result.numel() == 1 else [])
            else:
                below = name in ("lt", "__lt__", "less", "le")
                if not (name in ("le", "gt") and bound == 0):
                    self.decided[id(result)] = (bound >= 1) == below

    def _doubt(self, name: str, args: Any, result: Any) -> None:
        doubtful = name in functions.UNKNOWN_SHAPE or (name == "where" and len(args) == 1)
        if name == "repeat_interleave":
            doubtful = any(isinstance(item, torch.Tensor) for item in args[1:]) or len(args) == 1
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            doubtful = any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
        doubtful = doubtful or any(id(item) in self.unsure for item in flatten(list(args))[0])
        if doubtful and not (name in _OF_ONE_NUMBER and len(args) == 1):
            self.unsure.update(id(part) for _, part in parts_of(result) if isinstance(part, torch.Tensor))
