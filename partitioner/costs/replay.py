"""What a quick op takes where its stage is recorded: the same calls, one after the other, without autograd.

Stages run as recordings (runtime/joint): autograd's graph, its engine and a module's call, which take longer than the
arithmetic of a small op, are paid once, when the recording is made. So is what is left out here: the ATen calls of one
forward and one backward are noted, and the same calls timed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...entries import below_autograd, entry
from ...products import by_onednn
from ...structure import map_leaves

_aten = torch.ops.aten
_NOTHING = (_aten.detach.default, _aten.alias.default)  # of autograd's own; recordings have none of them


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the ATen calls of what runs inside, with their arguments, to be run again.

    With ``onednn``, large products are run again by oneDNN.
    """

    def __init__(self, onednn: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._onednn = onednn
        self._noted: list[tuple[Callable[..., Any], Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _NOTHING:
            products = by_onednn(func, args) if self._onednn and not kwargs else None
            self._noted.append((products or entry(func), *map_leaves(_alone, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    def run(self) -> list[Any]:
        """Run the calls again on the same arguments; return all results."""
        return [call(*args, **kwargs) for call, args, kwargs in self._noted]


def together(forwards: Sequence[Calls], backwards: Sequence[Calls], now: Callable[[], float]) -> tuple[float, float]:
    """Time forwards in a row, holding their results, then backwards; return the seconds of one of each.

    In a row, since that is how a stage runs them: after something else the same call takes three times as long.
    """
    with below_autograd():
        start = now()
        held = [calls.run() for calls in forwards]
        middle = now()
        for calls, results in zip(backwards, held):
            results[:] = calls.run()
        end = now()
    return (middle - start) / len(forwards), (end - middle) / len(backwards)


def _alone(leaf: Any) -> Any:
    """Return a tensor without its history, which would keep a graph alive."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
