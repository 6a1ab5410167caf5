"""How calls refer to what they use: values of other calls, the model's own tensors, constants, objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...runtime.program.calls import Build
from ...structure import Structure, flatten
from .calls import Call, map_values, parts_of
from .numbers import Known, Ref
from .state import TraceRefused
from .surroundings import line
from .tensors import Made, ModelState, storage_of

SPELLED = (type(None), bool, int, float, complex, str, torch.dtype, torch.layout, torch.memory_format, torch.device)
UNSPOKEN = "<a tensor without data>"


class Values:
    """The values of a recording, by identity. ``add`` writes down what has to be there before a value can be used.

    ``objects`` are those that no code can spell, by the names that the graph has for them.
    """

    def __init__(self, state: ModelState, made: Made, add: Callable[[Call], Ref]) -> None:
        self.objects: dict[str, Any] = {}
        self._state = state
        self._made = made
        self._add = add
        self._known: dict[int, tuple[Ref, Any]] = {}
        self._journal: list[tuple[int, Any]] = []
        self._n_parts: dict[tuple[int, Any], int] = {}
        self._forgotten: list[Any] = []

    def ref(self, value: Any) -> Ref | None:
        """Return what stands for a value that a call gave."""
        known = self._known.get(id(value))
        return None if known is None else known[0]

    def bind(self, value: Any, ref: Ref) -> None:
        """Remember that ``ref`` stands for ``value``."""
        self._journal.append((id(value), self._known.get(id(value))))
        self._known[id(value)] = (ref, value)
        if ref.path:
            whole = (ref.index, ref.path[:-1])
            self._n_parts[whole] = self._n_parts.get(whole, 0) + 1

    def mark(self) -> int:
        """Return a point to go back to."""
        return len(self._journal)

    def roll_back(self, mark: int) -> None:
        """Forget what was bound after a point."""
        while len(self._journal) > mark:
            key, before = self._journal.pop()
            ref, value = self._known.pop(key)
            self._forgotten.append(value)  # alive, so that nothing else gets its identity
            self._n_parts.pop((ref.index, ref.path[:-1]), None)
            if before is not None:
                self._known[key] = before

    def encoded(self, value: Any, of_torch: bool = False) -> Any:
        """Replace the leaves of nested arguments by what stands for them; ``of_torch``: those of a torch function."""
        if isinstance(value, tuple) and "__new__" in vars(type(value)) and hasattr(type(value).__base__, "_fields"):
            parts, structure = flatten(value)  # a named tuple with a constructor of its own, such as PackedSequence
            return self._built(structure, parts)
        if type(value) in (tuple, list):
            whole = self._whole(value) if of_torch else None
            return whole or type(value)(self.encoded(item, of_torch) for item in value)
        if type(value) is dict:
            return {key: self.encoded(item, of_torch) for key, item in value.items()}
        return map_values(self._leaf, value)

    def _whole(self, items: Sequence[Any]) -> Ref | None:
        """Refer to all parts of a value, in order, as that value: their number may be the batch size."""
        if len(items) < 2 or not isinstance(items[0], torch.Tensor):
            return None
        first = self.ref(items[0])
        if first is None or first.path[-1:] != (("item", 0),):
            return None
        whole = (first.index, first.path[:-1])
        wanted = [Ref(first.index, (*first.path[:-1], ("item", index))) for index in range(len(items))]
        if self._n_parts.get(whole) != len(items) or [self.ref(item) for item in items] != wanted:
            return None
        return Ref(*whole)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return self.ref_of(leaf)
        if isinstance(leaf, Known) or type(leaf) in SPELLED or leaf is Ellipsis:
            if isinstance(leaf, str) and UNSPOKEN in leaf:
                raise TraceRefused("it uses a tensor's data as text", line())
            return leaf
        if isinstance(leaf, SPELLED):  # numpy's float64 is a float
            kinds: tuple[Any, ...] = (bool, int, float, complex, str)
            return next(kind(leaf) for kind in kinds if isinstance(leaf, kind))
        if type(leaf).__module__ == "numpy" and hasattr(leaf, "item") and getattr(leaf, "ndim", 1) == 0:
            return leaf.item()
        known = self.ref(leaf)
        if known is not None:
            return known
        if isinstance(leaf, range):
            return list(leaf)
        parts, structure = flatten(leaf)
        if structure.kind != "leaf":
            return self._built(structure, parts)
        if any(isinstance(part, torch.Tensor) for _, part in parts_of(leaf)):
            raise TraceRefused(f"it hands over an object with tensors inside ({type(leaf).__name__})", line())
        return self._object(leaf)

    def _built(self, structure: Structure, parts: list[Any]) -> Ref:
        return self._add(Call("call_function", Build(structure), tuple(self.encoded(part) for part in parts)))

    def _object(self, value: Any) -> Ref:
        if isinstance(value, torch.Generator):
            raise TraceRefused("it draws from a random generator of its own", line())
        name = next((name for name, known in self.objects.items() if known is value), None)
        if name is None:
            name = f"_constant_{len(self.objects)}"
            self.objects[name] = value
        return self._add(Call("get_attr", name))

    def ref_of(self, tensor: torch.Tensor) -> Ref:
        """Return what stands for a tensor: a call's value, the model's own, or a constant.

        Raises:
            TraceRefused: nobody knows where it came from.
        """
        known = self.ref(tensor)
        if known is not None:
            return known
        named = self._state.tensors.get(id(tensor))
        if named is not None:
            return self._add(Call("get_attr", named[0]))
        fake = type(tensor) is not torch.Tensor and hasattr(tensor, "fake_mode")
        storage = None if fake else storage_of(tensor)
        if fake or storage is None or storage._cdata in self._made.storages:
            raise TraceRefused("it uses a tensor that was made in a way that cannot be seen", line())
        return self._object(tensor)
